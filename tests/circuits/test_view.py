"""`circuits view`: the library and its web side, and the whole path in a browser on a real server."""

import contextlib
import json
import shutil
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from circuits.effects import outcomes
from circuits.folder import with_effects
from circuits.graph import GraphError
from circuits.library import Library, thumbnail
from circuits.serve import HOST, create_app, index_page
from circuits.steering import Node, scale_nodes
from circuits.tracing import trace
from shared.errors import UserError
from shared.hooks import edit
from shared.listening import listen
from shared.models import ModelConfig, load
from shared.serialize import plain

CONFIG = ModelConfig("random:llama")
PROMPT = "one two three"


@pytest.fixture(scope="module")
def model():
    return load(CONFIG)


@pytest.fixture(scope="module")
def graph(model):
    return trace(model, PROMPT, top_k=2, max_nodes=20)


@pytest.fixture
def library(tmp_path, model, graph):
    with_effects(model, graph).save(tmp_path / "a folder" / "first")
    made = Library(tmp_path, CONFIG)
    made._model = model
    return made


@pytest.fixture
def server(library):
    """The application on a free port, in a thread; yields its address."""
    import uvicorn

    socket = listen(HOST, 0)
    server = uvicorn.Server(uvicorn.Config(create_app(library), log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        socket.close()


def ask(address, body=None, headers=None):
    """Status and text of a request, without any proxy."""
    data = None if body is None else json.dumps(body).encode()
    given = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(address, data=data, headers=given)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_live_edits_are_those_of_the_model(library, model, graph):
    places = [("neuron", *place) for place in graph.strongest(3)]
    found = library.scale("a folder/first", places, -2.0)
    with edit(model, scale_nodes([Node(*place) for _, *place in places], -2.0)):
        logits_V = model(model.encode([PROMPT]))[0, -1].detach()
    value_K = (logits_V[graph.header.target_ids] - logits_V.mean()).tolist()
    for change, value, before in zip(found["changes"], value_K, graph.header.target_values, strict=True):
        assert before + change == pytest.approx(value, abs=1e-4)
    with pytest.raises(GraphError, match=r"no node \['neuron', 0, 0, 99999\]"):
        library.scale("a folder/first", [("neuron", 0, 0, 99999)], 0.0)
    with pytest.raises(GraphError, match="no graph 'other'"):
        library.scale("other", places, 0.0)
    with pytest.raises(UserError, match="no finite logits"):
        library.scale("a folder/first", places, float("inf"))
    several = replace(graph.header, token_ids=[-1, *graph.header.token_ids[1:]])
    with pytest.raises(GraphError, match="several prompts"):
        outcomes(model, replace(graph, header=several), [([], 1.0)])


def test_a_folder_that_is_a_graph_and_one_that_is_broken(library, tmp_path):
    alone = Library(tmp_path / "a folder" / "first", CONFIG)
    assert list(alone.graphs()) == ["first"]
    (tmp_path / "a folder" / "cut").mkdir()
    for name in ("graph.json", "graph.safetensors"):
        content = (tmp_path / "a folder" / "first" / name).read_bytes()
        whole = name == "graph.json"
        (tmp_path / "a folder" / "cut" / name).write_bytes(content if whole else content[:-8])
    assert "is damaged" in library.summary("a folder/cut")["error"]
    (tmp_path / "a folder" / "first" / "supernodes.json").write_text("[]")
    assert "holds no supernodes" in library.summary("a folder/first")["error"]
    (tmp_path / "a folder" / "first" / "graph.json").write_text("{")
    assert "not JSON" in library.summary("a folder/first")["error"]
    assert "not JSON" in index_page(library)
    assert Library(tmp_path / "nowhere", CONFIG).graphs() == {}


def test_graphs_of_an_older_format_are_listed_as_unreadable(library, tmp_path):
    library.config = replace(CONFIG, name="")
    older = tmp_path / "a folder" / "an older one"  # comes before "first", whose model new prompts take
    shutil.copytree(tmp_path / "a folder" / "first", older)
    header = json.loads((older / "graph.json").read_text())
    (older / "graph.json").write_text(json.dumps(header | {"version": 1}))
    error = library.summary("a folder/an older one")["error"]
    assert f"trace again with `circuits trace --out {older} ...`" in error
    assert "\n" not in error
    assert error.count("format version 1") == 1
    assert json.dumps(error)[1:-1] in index_page(library)
    assert library._model_of_graphs() == CONFIG.name
    (older / "graph.json").write_text(json.dumps(header | {"version": 99}))
    assert "update this package" in library.summary("a folder/an older one")["error"]


def test_thumbnails_hold_the_strongest(graph):
    dots = thumbnail(graph)
    assert len(dots) == len(graph.neurons())
    assert all(0 <= entry <= 1 for dot in dots for entry in dot[:3])
    assert dots[0][2] == max(dot[2] for dot in dots)


def test_bad_requests_are_answered_in_one_line(server, library):
    name = f"{server}/graphs/a%20folder/first"
    assert ask(f"{server}/graphs/none")[0] == 400
    assert "no graph" in json.loads(ask(f"{server}/graphs/..%2F..%2Fetc")[1])["error"]
    status, text = ask(f"{name}/supernodes", {"supernodes": [{"label": "x", "nodes": [[1]]}]})
    assert (status, "no supernodes" in text) == (400, True)
    assert not list(library.root.rglob("supernodes.json"))[1:]
    assert ask(f"{name}/edit", {"nodes": "x", "factor": 0})[0] == 422
    assert "no node" in ask(f"{name}/edit", {"nodes": [], "factor": 0})[1]
    assert ask(f"{server}/traces/7")[0] == 400
    assert "empty" in ask(f"{server}/traces", {"prompt": " "})[1]
    assert ask(server, headers={"Host": "elsewhere.example"})[0] == 400
    assert ask(f"{server}/traces", {"prompt": "x"}, {"Content-Type": "text/plain"})[0] == 422


def test_a_trace_that_fails_says_why(library):
    number = library.start_trace(PROMPT, "no such token at all", "x")
    deadline = time.monotonic() + 60
    while library.jobs[number].error is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "no such token" in library.jobs[number].error
    assert list(library.graphs()) == ["a folder/first"]


def test_ports_that_are_taken_are_refused():
    with contextlib.closing(listen(HOST, 0)) as taken:
        taken.listen()
        with pytest.raises(UserError, match="0 takes a free one"):
            listen(HOST, taken.getsockname()[1])


def test_the_whole_path_in_a_browser(browser, server, library):
    """Index, a new prompt traced, its page, live steering, a supernode made and saved, and back as it was left."""
    with browser.open(server) as page:
        assert page.evaluate("document.querySelectorAll('#graphs a').length") == 1
        focusable = [node for node in page.accessibility() if node.get("focusable")]
        assert len(focusable) > 4
        assert all(node["name"].strip() for node in focusable)
        page.evaluate("byId('prompt').focus()")
        page.type("four five")
        page.press("Enter")
        page.wait_for("location.pathname === '/graphs/four-five' && typeof supernodes !== 'undefined'")
        page.evaluate("pick(ranked[0])")
        page.evaluate("document.querySelector('#panel input[type=number]').value = '-3'")
        page.evaluate("document.querySelector('#panel span.row button').click()")
        page.wait_for("!document.querySelector('.outcome').innerText.startsWith('running')")
        assert page.evaluate("document.querySelector('.outcome p') !== null"), page.text(".outcome")
        place = page.evaluate("['neuron', ranked[0].layer, ranked[0].position, ranked[0].index]")
        found = library.scale("four-five", [tuple(place)], -3.0)
        value = page.evaluate("header.target_values[0]") + found["changes"][0]
        shown = page.text(".outcome li").replace("\u2212", "-").split("\u2192")[1]
        assert float(shown) == pytest.approx(value, rel=0.02, abs=0.006)
        page.evaluate("pick(nodes.find((node) => node.kind === 'embedding'))")
        page.evaluate("document.querySelector('#panel input[type=number]').value = '4'")
        page.evaluate("document.querySelector('#panel span.row button').click()")
        page.wait_for("!document.querySelector('.outcome').innerText.startsWith('running')")
        token = library.scale("four-five", [("embedding", -1, 0, 0)], 4.0)
        shown = page.text(".outcome li").replace("\u2212", "-").split("\u2192")[1]
        value = page.evaluate("header.target_values[0]") + token["changes"][0]
        assert float(shown) == pytest.approx(value, rel=0.02, abs=0.006)
        page.evaluate("group([ranked[0], ranked[1]])")
        page.click("#tab-groups")
        page.click("#save")
        page.wait_for("byId('said').textContent === '1 supernodes saved'")
        saved = library.open("four-five").supernodes
        assert plain(saved) == page.evaluate("writtenSupernodes()")
        page.load(f"{server}/graphs/four-five")
        assert page.evaluate("writtenSupernodes()") == plain(saved)
        assert not page.errors
        assert all(address.startswith(server) for address in page.fetched)
