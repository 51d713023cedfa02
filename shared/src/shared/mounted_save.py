"""Import libraries that nnsight's `save` on every object would break.

nnsight gives `object` a method `save` when it is imported. A library that looks through the names of a class while
defining it (anyio's typed attributes) then finds one that it did not define, and its import fails. This project calls
`nnsight.save(value)` itself and does not need the method; others in the process may, so it is back after the import.
"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_mounted_save() -> Iterator[None]:
    """While it is open, objects have no `save` of nnsight's; nothing changes where nnsight mounted none."""
    import nnsight
    from nnsight._c import mount, unmount

    mounted = unmount is not None and hasattr(object, "save")
    if mounted:
        unmount("save")
    try:
        yield
    finally:
        if mounted:
            mount(nnsight.save, "save")
