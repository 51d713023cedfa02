"""The page in a browser: nothing fetched, nothing wrong in the console, and every figure that of the graph."""

import json
import re

import pytest
import torch

from circuits.clusters import Stability
from circuits.folder import GraphFolder, members_of, open_folder, with_effects
from circuits.graph import KINDS, LOGIT, NEURON
from circuits.merge import mean_graph
from circuits.supernodes import Supernode, Supernodes, read_supernodes
from circuits.tracing import trace
from circuits.view import page, page_data, token_rows, write_page
from shared.errors import UserError
from shared.models import ModelConfig, load

PROMPT = "the </script> cat & dog"


@pytest.fixture(scope="module")
def model():
    return load(ModelConfig("random:gpt2", dtype="float64"))


@pytest.fixture(scope="module")
def content(model) -> GraphFolder:
    graph = trace(model, PROMPT, top_k=3, max_nodes=60, max_edges=600)
    strongest = graph.strongest(6)
    rows = [
        Supernode("first & <best>", [(*place, 0) for place in strongest[:3]]),
        Supernode("second", [(layer, None, neuron, 0) for layer, _, neuron in strongest[3:5]]),
    ]
    return with_effects(model, graph, Supernodes(rows))


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    return content.save(tmp_path_factory.mktemp("graphs") / "one")


@pytest.fixture
def open_page(browser, folder):
    with browser.open(folder / "index.html") as page:
        yield page
        assert not page.errors
        assert page.fetched == [page.url]


def item(page, expression):
    """Where an item is in the window, as (x, y)."""
    box = "document.getElementById('plot').getBoundingClientRect()"
    place = page.evaluate(
        f"(() => {{ const at = toScreen({expression}), box = {box}; return [at.x + box.x, at.y + box.y]; }})()"
    )
    return tuple(place)


def test_page_stands_alone_and_holds_the_graph(content, tmp_path):
    graph = content.graph
    text = write_page(graph, tmp_path / "page.html", "a <b> title").read_text()
    assert text == page(graph, "a <b> title")
    assert not re.search(r"""(src|href)\s*=\s*["']|@import|url\(|https?://""", text)
    assert "<title>a &lt;b&gt; title</title>" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    shown = json.loads(data)
    assert shown["header"]["prompt"] == graph.header.prompt
    assert len(shown["nodes"]) == len(graph)
    assert shown["edges"]["source"] == graph.source_e.tolist()
    assert shown["edges"]["weight"] == pytest.approx(graph.weight_e.tolist(), rel=1e-5)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (620, True)])
def test_opens_without_an_error_and_draws(browser, folder, width, dark):
    with browser.open(folder / "index.html", width=width, dark=dark) as page:
        colours = page.evaluate(
            "new Set(new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
        )
        assert colours > 20
        assert page.text("#title") == page.evaluate("header.prompt.trim().replace(/\\s+/g, ' ')")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for _ in range(2):  # as large as its place, also after the window changes
            assert page.evaluate("canvas.width === Math.round(byId('stage').getBoundingClientRect().width)")
            assert page.evaluate("canvas.height === Math.round(byId('stage').getBoundingClientRect().height)")
            page.set_size(width + 60, 700)
            page.settle()
        assert not page.errors
        assert page.fetched == [page.url]


def test_the_heading_of_a_long_prompt_shows_both_ends(browser, content, tmp_path):
    title = "start " + "word " * 200 + "end"
    with browser.open(write_page(content.graph, tmp_path / "page.html", title)) as page:
        shown = page.text("#title")
        assert re.fullmatch(r"start word .* \.\.\. .* word end", shown)
        assert len(shown) < 200
        assert page.evaluate("byId('title').title") == title


def test_the_policy_lets_no_other_script_run(open_page):
    open_page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.ran = 1' }))"
    )
    assert open_page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in error for error in open_page.errors)
    open_page.errors.clear()


def test_a_click_shows_the_nodes_figures_and_its_edges(open_page, content):
    graph = content.graph
    open_page.evaluate("foldAll(false)")
    open_page.click_at(*item(open_page, "ranked[0]"))
    node = open_page.evaluate("state.picked.id")
    neurons = (graph.kind_n == NEURON).nonzero()[:, 0]
    assert node == int(neurons[graph.total_nK[neurons].abs().sum(1).argmax()])
    assert open_page.text("#panel h2").startswith(graph.label(node))
    links = open_page.evaluate(
        "scene.links.filter((link) => link.source === state.picked || link.target === state.picked)"
        ".map((link) => [link.source.id, link.target.id, link.weight])"
    )
    weights = page_data(graph)["edges"]["weight"]
    edges = list(zip(graph.source_e.tolist(), graph.target_e.tolist(), weights, strict=True))
    assert sorted(map(tuple, links)) == sorted(edge for edge in edges if node in edge[:2])
    figures = open_page.evaluate(
        "[...document.querySelectorAll('#panel ul')].map((list) => list.children.length)"
    )
    assert sum(figures) >= min(25, len(links))
    open_page.click_at(*item(open_page, "ranked[0]"))
    assert open_page.evaluate("state.picked") is None


def test_sliders_filter_and_tell_the_mass_kept(open_page, content):
    graph = content.graph
    strength = graph.total_nK.abs().sum(1)[graph.kind_n == NEURON].sort(descending=True).values
    open_page.evaluate("foldAll(false)")
    for count, edges in ((60, 600), (20, 100), (0, 0)):
        open_page.set_value("#count", count)
        open_page.set_value("#edges", edges)
        shown = open_page.evaluate("scene.items.filter((one) => one.kind === 'neuron').length")
        assert shown == min(count, len(strength))
        mass = float(strength[:count].sum() / strength.sum()) * graph.header.node_mass_kept
        assert open_page.evaluate("byId('node-mass').value") == pytest.approx(mass, rel=1e-6)
        drawn = open_page.evaluate("scene.chosen.map((link) => link.edge.share)")
        every = open_page.evaluate("edges.map((edge) => edge.share)")
        share = sum(drawn) / sum(every) * graph.header.edge_mass_kept
        assert len(drawn) <= edges
        assert open_page.evaluate("byId('edge-mass').value") == pytest.approx(share, rel=1e-6)
    assert "0 of" in open_page.text("#edges-out")


def test_search_finds_tokens_layers_neurons_and_descriptions(open_page, content):
    graph = content.graph
    open_page.evaluate("foldAll(false)")
    layer, position, neuron = graph.strongest(1)[0]
    at_layer = {node for node in range(len(graph)) if int(graph.layer_n[node]) == layer}
    note = next(iter(graph.header.notes.values())).split("'")[1]

    def found(words):
        open_page.set_value("#find", words)
        return set(open_page.evaluate("[...state.matches].map((one) => one.id)"))

    assert found(f"layer {layer}") >= at_layer - found("attn_bias")
    assert len(found(f"L{layer}/N{neuron}")) >= 1
    token = graph.header.tokens[position]
    assert found(token) >= {node for node in range(len(graph)) if int(graph.position_n[node]) == position}
    assert found(note)
    assert found("no such thing") == set()
    assert open_page.text("#panel h2") == "0 found"
    open_page.set_value("#find", f"L{layer}/N{neuron}")
    open_page.click("#find")
    open_page.press("Enter")
    assert open_page.text("#panel h2").startswith(f"L{layer}/N{neuron}")


def test_supernodes_fold_and_their_edges_are_sums(open_page, content):
    graph = content.graph
    folded = open_page.evaluate("supernodes.map((one) => [...one.members].map((node) => node.id))")
    assert [sorted(members) for members in folded] == [
        sorted(members_of(graph, row)) for row in content.supernodes.supernodes
    ]
    shown = set(open_page.evaluate("scene.items.filter((one) => !one.members).map((one) => one.id)"))
    assert not shown & {node for members in folded for node in members}
    flows = open_page.evaluate(
        "scene.links.filter((link) => link.source === supernodes[0] && !link.target.members)"
        ".map((link) => [link.target.id, link.flow])"
    )
    assert flows
    for target, flow in flows:
        into = (graph.target_e == target) & torch.isin(graph.source_e, torch.tensor(folded[0]))
        per = 1.0 if graph.kind_n[target] == LOGIT else graph.total_nK[target, 0] / graph.activation_n[target]
        if graph.kind_n[target] == LOGIT:
            per = float(graph.index_n[target] == 0)
        assert flow == pytest.approx(float(graph.weight_e[into].sum() * per), rel=1e-4, abs=1e-9)
    open_page.click("#tab-groups")
    open_page.click("#panel .row:nth-of-type(1) button:nth-of-type(3)")
    after = set(open_page.evaluate("scene.items.filter((one) => !one.members).map((one) => one.id)"))
    assert after == set(range(len(graph)))


def test_supernodes_are_made_named_changed_and_written(open_page, content):
    open_page.evaluate("foldAll(false)")
    open_page.click_at(*item(open_page, "ranked[6]"), shift=True)
    open_page.click_at(*item(open_page, "ranked[7]"), shift=True)
    assert open_page.text("#group") == "group 2 marked"
    open_page.press("g")
    assert open_page.evaluate("supernodes.length") == 3
    open_page.evaluate("byId('label').focus()")
    open_page.type("mine")
    open_page.evaluate("byId('label').dispatchEvent(new Event('change'))")
    assert open_page.text("#panel h2") == "mine"
    open_page.click("#panel .member button")
    written = open_page.evaluate("writtenSupernodes()")["supernodes"]
    assert [row["label"] for row in written] == ["first & <best>", "second", "mine"]
    assert len(written[2]["nodes"]) == 1
    assert written[2]["nodes"][0] == open_page.evaluate("place4([...supernodes[2].members][0])")
    open_page.evaluate("readSupernodes(JSON.parse(JSON.stringify(writtenSupernodes())))")
    assert open_page.evaluate("writtenSupernodes()")["supernodes"] == written
    for row, before in zip(written, content.supernodes.supernodes, strict=False):
        after = Supernode(row["label"], [tuple(place) for place in row["nodes"]])
        assert members_of(content.graph, after) == members_of(content.graph, before)
    open_page.evaluate("openFile(new File(['{'], 'x.json'))")
    assert "cannot be read" in open_page.evaluate("byId('said').textContent")
    with_fault = """{supernodes: [{label: 'a', nodes: [[0, 0, 1, 0]]}, {label: 'b'}]}"""
    assert open_page.evaluate(
        f"(() => {{ try {{ readSupernodes({with_fault}); }} catch {{ return true; }} }})()"
    )
    assert open_page.evaluate("writtenSupernodes()")["supernodes"] == written  # a bad file costs none
    elsewhere = {"label": "of another prompt", "nodes": [[0, None, 99999, 0]]}
    open_page.evaluate(f"readSupernodes({json.dumps({'supernodes': [*written, elsewhere]})})")
    assert open_page.evaluate("writtenSupernodes()")["supernodes"] == [*written, elsewhere]


FOUND = Stability(3, 0.5, 0.01, 0.125, 0.25, 0.0, 0.1)


def found_supernodes(graph) -> Supernodes:
    """A clustering's file: neurons at every position, of either sign, shared, and of other prompts."""
    (layer, position, neuron), (second, _, other), *_ = graph.strongest(12)[6:]
    rows = [
        Supernode("anywhere", [(layer, None, neuron, 0), (0, None, 99999, -1)]),
        Supernode("of another prompt", [(0, 77, 99999, 1)]),
        Supernode("shared", [(layer, position, neuron, 0), (second, None, other, 0)]),
        Supernode("hidden by the one before", [(second, None, other, 0)]),
    ]
    return Supernodes(rows, 4, [FOUND], [1.5, 2.0, 3.0, 4.25], 0.75, 10)


def test_supernodes_are_read_and_written_without_loss(browser, content, tmp_path):
    """Through the folder, the page as it opens, and a file opened on it: what was not edited is as it was."""
    found = found_supernodes(content.graph)
    folder = GraphFolder(content.graph, found).save(tmp_path / "found")
    assert open_folder(folder).supernodes == found

    def written(page):
        path = tmp_path / "written.json"
        path.write_text(json.dumps(page.evaluate("writtenSupernodes()")))
        return read_supernodes(path)

    with browser.open(folder / "index.html") as page:
        assert written(page) == found
        text = json.dumps((folder / "supernodes.json").read_text())
        page.evaluate("removeSupernode(groups[0])")
        page.evaluate(f"openFile(new File([{text}], 'supernodes.json'))")
        page.wait_for("groups.length === 4")
        assert written(page) == found
        page.click("#tab-groups")
        assert "name no neuron of this graph" in page.text("#panel")
        assert "save" not in page.text("#panel").split()  # nothing to save to in a file
        page.evaluate("takeOut(ranked[6].super, ranked[6])")
        page.evaluate("addTo(supernodes[0], ranked[9])")
        edited = written(page)
        assert not page.errors
    (layer, position, neuron), fourth = content.graph.strongest(12)[6], content.graph.strongest(12)[9]
    assert edited.stability == found.stability
    assert (edited.number, edited.coverage, edited.contexts) == (4, 0.75, 10)
    for before, after, support in zip(found.supernodes, edited.supernodes, edited.support, strict=True):
        if after == before:
            assert support == found.support[found.supernodes.index(before)]
        else:
            assert support is None
    assert (0, 77, 99999, 1) in edited.supernodes[1].nodes
    assert (layer, position, neuron, 0) not in edited.supernodes[2].nodes
    assert sum(place[:3] == fourth for one in edited.supernodes for place in one.nodes) == 1


def test_steering_shows_what_was_computed_beforehand(open_page, content):
    graph = content.graph
    open_page.evaluate("pick(supernodes[0])")
    buttons = open_page.evaluate(
        "[...document.querySelectorAll('#panel .row button')].map((one) => one.innerText)"
    )
    assert buttons[-3:] == ["ablate \u00d70", "flip \u00d7\u22121", "double \u00d72"]
    open_page.evaluate("[...document.querySelectorAll('#panel .row button')].at(-3).click()")
    members = sorted(members_of(graph, content.supernodes.supernodes[0]))
    outcome = next(row for row in content.effects if row["nodes"] == members)["outcomes"]["0"]
    after = graph.header.target_values[0] + outcome["changes"][0]
    shown = open_page.text(".outcome li").replace("\u2212", "-")
    assert float(shown.split("\u2192")[1]) == pytest.approx(after, rel=0.01, abs=0.01)
    assert f"{100 * outcome['top'][0]['probability']:.0f}" in open_page.text(".outcome p")
    for kind in ("embedding", "position", "attn_bias", "mlp_bias"):
        done = next(row for row in content.effects if KINDS[int(graph.kind_n[row["nodes"][0]])] == kind)
        open_page.evaluate(f"pick(nodes[{done['nodes'][0]}])")
        open_page.evaluate("[...document.querySelectorAll('#panel .row button')].at(-1).click()")
        after = graph.header.target_values[0] + done["outcomes"]["2"]["changes"][0]
        shown = open_page.text(".outcome li").replace("\u2212", "-")
        assert float(shown.split("\u2192")[1]) == pytest.approx(after, rel=0.01, abs=0.01)
    open_page.evaluate("pick(nodes.find((node) => node.kind === 'logit'))")
    assert "nothing to scale" in open_page.text("#panel")


def test_a_page_of_several_prompts_says_why_nothing_can_be_scaled(browser, content, tmp_path):
    both = mean_graph([content.graph, content.graph])
    with browser.open(write_page(both, tmp_path / "both.html")) as page:
        page.evaluate("pick(ranked[0])")
        assert "The graph combines several prompts" in page.text("#panel")
        assert not page.errors


def test_the_prompts_tokens_show_what_a_node_comes_from(open_page, content):
    graph = content.graph
    open_page.evaluate("foldAll(false)")
    rows = "[...document.querySelectorAll('#panel [role=table] [role=row]')]"
    for node in (graph.strongest_numbers(1)[0], len(graph) - 1):
        open_page.evaluate(f"pick(nodes[{node}])")
        cells = open_page.evaluate(f"{rows}.map((row) => [...row.children].map((one) => one.innerText))")
        assert [word for word, _ in cells] == open_page.evaluate("header.tokens.map(word)")
        figures = [float(value.replace("\u2212", "-")) for _, value in cells if value != "\u00b7"]
        expected = [value for value in graph.token_nT[node].tolist() if value]
        assert figures == pytest.approx(expected, rel=0.06, abs=0.0051)
        rest = float(graph.activation_n[node] - graph.token_nT[node].sum())
        told = open_page.evaluate("[...document.querySelectorAll('#panel dd')].map((one) => one.innerText)")
        assert any(float(value) == pytest.approx(rest, rel=0.01, abs=0.006) for value in map(leading, told))
    tree = open_page.accessibility()
    assert any(node["role"] == "table" and node["name"] == "from tokens" for node in tree)
    assert sum(node["role"] == "rowheader" for node in tree) == len(graph.header.tokens)
    one = content.supernodes.supernodes[0]
    open_page.evaluate("pick(supernodes[0])")
    values = open_page.evaluate("tokenMap(supernodes[0]).values")
    members = members_of(graph, one)
    unit_m = graph.total_nK[members, 0] / graph.activation_n[members]
    assert values == pytest.approx(
        (graph.token_nT[members] * unit_m[:, None]).sum(0).tolist(), rel=1e-2, abs=1e-3
    )


def leading(text):
    """The figure that a text begins with, or nan."""
    found = re.match(r"[-+]?\d[\d.]*(e[-+]?\d+)?", text.replace("\u2212", "-"))
    return float(found[0]) if found else float("nan")


def test_long_prompts_show_their_strongest_tokens(content, monkeypatch):
    monkeypatch.setattr("circuits.view.TOKENS", 3)
    graph = content.graph
    rows = token_rows(graph)
    for node in range(len(graph)):
        if graph.kind_n[node] not in (NEURON, LOGIT):
            assert rows[node] == []
            continue
        *values, total = rows[node]
        kept = graph.token_nT[node].abs().topk(3).indices.tolist()
        assert [i for i, value in enumerate(values) if value] == sorted(kept)
        assert values[kept[0]] == pytest.approx(float(graph.token_nT[node, kept[0]]), rel=1e-3)
        assert total == pytest.approx(float(graph.token_nT[node].sum()))


def test_everything_goes_by_keyboard_and_is_said(open_page):
    open_page.evaluate("foldAll(false)")
    open_page.press("/")
    assert open_page.evaluate("document.activeElement.id") == "find"
    open_page.press("Escape")
    assert open_page.evaluate("document.activeElement.id") == "plot"
    open_page.press("ArrowUp")
    first = open_page.evaluate("state.focus.id")
    said = open_page.evaluate("byId('said').textContent")
    assert "effect" in said
    open_page.press("ArrowDown")
    assert open_page.evaluate(f"state.focus.y > nodes[{first}].y")
    assert open_page.evaluate("byId('said').textContent") != said
    open_page.press("ArrowUp")
    open_page.press("Enter")
    assert open_page.evaluate("state.picked === state.focus")
    assert "edges shown" in open_page.evaluate("byId('said').textContent")
    open_page.press("Escape")
    assert open_page.evaluate("state.picked") is None
    open_page.press("0")
    zoomed = open_page.evaluate("view.k")
    open_page.press("+")
    assert open_page.evaluate("view.k") > zoomed
    open_page.press("0")
    assert open_page.evaluate("view.k") == pytest.approx(zoomed)
    open_page.evaluate("byId('tab-details').focus()")
    open_page.press("ArrowRight")
    assert open_page.evaluate("document.activeElement.id") == "tab-nodes"
    assert open_page.text("#panel h2").endswith("nodes by effect")


def test_a_screen_reader_gets_names_for_everything(open_page):
    tree = open_page.accessibility()
    controls = [node for node in tree if node["role"] in {"button", "slider", "searchbox", "combobox", "tab"}]
    assert len(controls) > 10
    assert all(node["name"] for node in controls)
    assert any(node["role"] == "application" and node["name"] for node in tree)
    assert any(node["role"] == "status" for node in tree)
    assert any(node["role"] == "tabpanel" and node["name"] == "Details" for node in tree)
    assert {node["name"] for node in tree if node["role"] in {"meter"}} == {
        "share of the nodes' effect that is shown",
        "share of the edges' effect that is shown",
    }


STATES = {
    "overview": "0",
    "a neuron": "pick(ranked[20])",
    "a token": "pick(nodes[0])",
    "a target": "pick(nodes.at(-1))",
    "a supernode": "pick(supernodes[0])",
    "the nodes": "openTab('nodes')",
    "the supernodes": "openTab('groups')",
}


@pytest.mark.parametrize("state", STATES)
def test_everything_that_takes_the_focus_has_a_name(open_page, state):
    open_page.evaluate(STATES[state])
    tree = open_page.accessibility()
    focusable = [node for node in tree if node.get("focusable")]
    assert len(focusable) > 8
    assert open_page.evaluate("byId('panel').scrollWidth <= byId('panel').clientWidth")
    assert [node for node in focusable if not node["name"].strip()] == []
    assert [node for node in tree if node["role"] == "image" and not node["name"]] == []


def test_the_focus_goes_through_the_page_in_reading_order(open_page):
    open_page.evaluate("document.body.focus()")
    order = []
    for _ in range(9):
        open_page.press("Tab")
        order.append(
            open_page.evaluate("document.activeElement.id || document.activeElement.closest('[id]').id")
        )
    assert order[:7] == ["target", "count", "edges", "find", "fit", "plot", "tab-details"]
    assert order[7:] == ["panel", "panel"]


def test_the_drawing_has_an_equal_table(open_page, content):
    """All that is drawn is in the table of the tab Nodes, with the figures that the details show."""
    graph = content.graph
    open_page.evaluate("foldAll(false); openTab('nodes')")
    open_page.click("#panel .more")
    tree = open_page.accessibility()
    (table,) = [node for node in tree if node["role"] == "table"]
    assert table["name"] == f"{len(graph)} nodes by effect"
    headers = [node["name"] for node in tree if node["role"] == "columnheader"]
    assert headers[:3] == ["node", "layer", "activation"]
    assert sum(node["role"] == "rowheader" for node in tree) == len(graph)
    rows = open_page.evaluate(
        "[...document.querySelectorAll('#panel tbody tr')].map((row) => [...row.children].map((one) => one.innerText))"
    )
    strength = graph.total_nK.abs().sum(1)
    best = graph.strongest_numbers(1)[0]
    row = next(row for row in rows if row[0].startswith(graph.label(best)))
    assert float(row[2].replace("\u2212", "-")) == pytest.approx(float(graph.activation_n[best]), rel=0.02)
    assert float(row[3].replace("\u2212", "-")) == pytest.approx(float(graph.total_nK[best, 0]), rel=0.02)
    drawn = open_page.evaluate(
        "[...scene.items].sort((a, b) => strengthOf(b) - strengthOf(a)).map((one) => one.id)"
    )
    assert strength[drawn].tolist() == sorted(strength.tolist(), reverse=True)
    open_page.click("#panel tbody button")
    assert open_page.evaluate("state.picked.id") == drawn[0]


def test_tokens_take_the_colour_of_what_is_under_the_pointer(open_page):
    open_page.evaluate("foldAll(false)")

    def strip():
        return open_page.evaluate(
            "[...pen.getImageData(0, canvas.height - AXIS.bottom, canvas.width, AXIS.bottom).data].join()"
        )

    open_page.settle()
    before = strip()
    open_page.hover(*item(open_page, "ranked[0]"))
    assert open_page.evaluate("state.over === ranked[0]")
    assert strip() != before
    open_page.hover(*item(open_page, "nodes[0]"))  # a token comes from itself alone
    assert strip() == before


def test_pointer_zooms_pans_and_tells(open_page):
    open_page.evaluate("foldAll(false)")
    x, y = item(open_page, "ranked[0]")
    before = open_page.evaluate("view")
    open_page.wheel(x, y, -240)
    after = open_page.evaluate("view")
    assert after["k"] > before["k"]
    assert item(open_page, "ranked[0]") == pytest.approx((x, y), abs=1.0)
    open_page.drag((300, 400), (360, 430))
    moved = open_page.evaluate("view")
    assert (moved["x"] - after["x"], moved["y"] - after["y"]) == pytest.approx((60, 30))
    assert open_page.evaluate("state.picked") is None
    open_page.hover(*item(open_page, "nodes.find((node) => node.kind === 'logit')"))
    assert open_page.evaluate("!byId('tip').hidden && byId('tip').innerText").startswith(
        open_page.evaluate("nameOf(nodes.find((node) => node.kind === 'logit'))")
    )


def test_strongest_paths_are_those_of_all_paths(open_page, content):
    """Brute force: the best product of parts over every chain of edges from an input to the node."""
    graph = content.graph
    received = graph.remainder_n.abs().index_add(0, graph.target_e, graph.weight_e.abs())
    parts = (graph.weight_e.abs() / received[graph.target_e]).tolist()
    incoming: dict[int, list[tuple[int, float]]] = {}
    for source, target, part in zip(graph.source_e.tolist(), graph.target_e.tolist(), parts, strict=True):
        incoming.setdefault(target, []).append((source, part))

    def chains(node):
        if node not in incoming:
            yield 1.0
        for source, part in incoming.get(node, ()):
            yield from (part * rest for rest in chains(source))

    layer_0 = [n for n in range(len(graph)) if int(graph.layer_n[n]) <= 1 and n in incoming]
    best = open_page.evaluate("up.map((one) => one.value)")
    for node in layer_0:
        assert best[node] == pytest.approx(max(chains(node)), rel=1e-4)
    path = open_page.evaluate(
        "[...pathsThrough(ranked[0], 1)].map((edge) => [edge.source.id, edge.target.id])"
    )
    node = open_page.evaluate("ranked[0].id")
    ends = {end for edge in path for end in edge}
    assert node in ends
    assert any(graph.kind_n[end] == LOGIT for end in ends)


def test_folder_round_trip_and_faults(content, folder, tmp_path):
    again = open_folder(folder)
    assert again.supernodes == content.supernodes
    assert again.effects == json.loads(json.dumps(content.effects))
    assert torch.equal(again.graph.weight_e, content.graph.weight_e)
    for text, reason in [
        ("{", "supernodes.json holds no supernodes"),
        ("[]", "missing key 'supernodes'"),
        ('{"supernodes": [{"label": "a"}]}', "missing key"),
        ('{"supernodes": [{"label": "a", "nodes": [[1, 2]]}]}', "nodes"),
        ('{"supernodes": [{"label": "a", "nodes": [[1, 2, "x", 0]]}]}', "nodes"),
    ]:
        copy = content.graph.save(tmp_path / "copy")
        (copy / "supernodes.json").write_text(text)
        with pytest.raises(UserError, match=reason):
            open_folder(copy)
