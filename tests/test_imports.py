"""The rooms of nuqjax: which module may import which, one way, and what a user gets from `import nuqjax`."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import nuqjax

PACKAGE = Path(nuqjax.__file__).parent
EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# room: (rooms it may import, packages it may import besides the standard library), in the order of the flow.
# `fit_knq` stands for fit_knq.py and its parts fit_knq_*.py, which may import one another.
ARRAYS = {"jax", "numpy"}
FITS = {"fit_knq", "fit_enq", "fit_grid"}
LEAF = {"compat", "host", "meshes", "rows", "packing", "fixed_point", "codebook_array"}
EMULATION = {"emulate", "calibrate", "fold"}
ROOMS: dict[str, tuple[set[str], set[str]]] = {
    "rules": (set(), {"jax"}),
    "stacks": ({"rules"}, {"jax"}),
    "compat": (set(), {"jax"}),
    "host": ({"compat"}, ARRAYS),
    "meshes": (set(), {"jax"}),
    "rows": ({"host"}, ARRAYS),
    "assign": ({"compat", "host", "meshes", "rows"}, ARRAYS),
    "fit_knq": ({"assign", "compat", "host", "rows"}, ARRAYS),
    "fit_enq": ({"assign", "compat", "host", "rows"}, ARRAYS),
    "fit_grid": ({"assign", "compat", "host", "rows"}, ARRAYS),
    "fit": ({"assign", "host", "meshes", *FITS}, ARRAYS),
    "fit_mesh": ({"assign", "rows", "fit_knq"}, ARRAYS),
    "fixed_point": ({"compat", "host", "rows"}, ARRAYS),
    "packing": ({"rows"}, ARRAYS),
    "codebook_array": ({"host", "meshes", "rows", "packing", "fixed_point"}, ARRAYS),
    "shardings": (LEAF, ARRAYS),
    "plot": ({"rules", *LEAF}, {*ARRAYS, "matplotlib"}),
    "report": ({"rules", "plot", *LEAF}, {*ARRAYS, "rich"}),
    "plan": ({"rules", "stacks", "fit", "report", *LEAF}, {*ARRAYS, "rich"}),
    "compress": ({"rules", "assign", "fit", "fit_mesh", "shardings", "plan", "report", *LEAF}, {*ARRAYS, "rich"}),
    "interpret": ({"compat", "meshes"}, ARRAYS),
    "apply": ({"rules", "interpret", *LEAF}, ARRAYS),
    # `emulate` stands for emulate.py and its parts emulate_*.py, too.
    "emulate": ({"rules", "interpret", "report", *LEAF}, {*ARRAYS, "rich"}),
    "calibrate": ({"emulate", *LEAF}, ARRAYS),
    "fold": ({"emulate", "interpret", "rules", *LEAF}, ARRAYS),
    # `store` stands for store.py and its parts store_*.py.
    "store": ({"rules", "report", "shardings", *LEAF}, {*ARRAYS, "constriction"}),
    # `checkpoint` stands for checkpoint.py and its parts checkpoint_*.py.
    "checkpoint": ({"rules", "store", *LEAF}, {*ARRAYS, "flax", "h5py", "msgpack", "orbax"}),
    "convert": ({"rules", "plan", "compress", "report", "store", "checkpoint"}, ARRAYS),
    "compare": (set(), ARRAYS),
    "fisher": (set(), ARRAYS),
    # `export` stands for export.py and export_onnx.py.
    "export": ({"rules", "interpret", "apply", "store", *LEAF}, {*ARRAYS, "flatbuffers", "jax2onnx", "onnx"}),
    # The folder `_src/calibration/` and its face, `calibration.py`.
    "calibration": (
        {
            "rules",
            "stacks",
            "assign",
            "fit",
            "shardings",
            "plan",
            "compress",
            "report",
            "interpret",
            "apply",
            *EMULATION,
            "fisher",
            *LEAF,
        },
        {*ARRAYS, "rich"},
    ),
    "__init__": (
        {
            "rules",
            "assign",
            "fit",
            "plan",
            "compress",
            "apply",
            "report",
            "shardings",
            "fisher",
            "export",
            "store",
            "checkpoint",
            "convert",
            "calibration",
            *EMULATION,
            *LEAF,
        },
        set(),
    ),
    "cli": ({"rules", "plot", "report", "compare"}, {*ARRAYS, "rich", "shtab"}),  # public names, and pictures
    "__main__": ({"cli"}, set()),
}


def room_of(module: str) -> str:
    """The room a module belongs to: its own name, or that of the file whose part it is."""
    return next((room for room in ROOMS if module.startswith(f"{room}_") and module not in ROOMS), module)


def module_of(path: Path) -> str:
    """`nuqjax/_src/calibration/solver.py` → `calibration`: a folder is one room, and its face belongs to it."""
    return room_in(path.relative_to(PACKAGE).with_suffix("").parts)


def room_in(parts: Sequence[str]) -> str:
    """The module that the parts of a path, or of a dotted name inside the package, belong to."""
    return parts[1] if parts[0] == "_src" and len(parts) > 1 else parts[0]


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of what a source file imports, wherever in the file it does; not what only types need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["nuqjax" if node.level else "", node.module or ""]))
            # `from nuqjax import fit` imports a module of the package, `from nuqjax.fit import fit` a name of one.
            names |= {f"nuqjax.{alias.name}" for alias in node.names} if base == "nuqjax" else {base}
    return names


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_the_table_and_the_package_name_the_same_rooms():
    assert {room_of(module_of(path)) for path in SOURCES} == set(ROOMS)


def test_the_arrows_of_the_table_point_one_way():
    order = list(ROOMS)
    for room, (may_import, _) in ROOMS.items():
        assert may_import <= set(order[: order.index(room)]), room


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_a_room_imports_only_what_the_table_allows(path):
    room = room_of(module_of(path))
    rooms, packages = ROOMS[room]
    modules = imported_modules(path)
    inside = {room_of(room_in(name.split(".")[1:])) for name in modules if name.startswith("nuqjax.")}
    outside = {name.split(".")[0] for name in modules} - {"nuqjax"} - set(sys.stdlib_module_names)
    assert inside - {room} <= rooms
    assert outside <= packages


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_what_releases_of_jax_name_differently_comes_from_compat(path):
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert path.stem == "compat" or not used & {"jax.enable_x64", "jax.experimental.enable_x64"}


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda path: path.stem)
def test_experiments_use_public_names_only(path):
    public = {f"nuqjax.{name}" for name in nuqjax.__all__}
    assert {name for name in imported_modules(path) if name.startswith("nuqjax.")} <= public
    tree = ast.parse(path.read_text(encoding="utf-8"))
    attributes = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nuqjax"
    }
    assert attributes <= {*nuqjax.__all__, "__version__"}


@pytest.mark.parametrize("name", nuqjax.__all__)
def test_every_public_name_is_documented_with_an_example(name):
    public = getattr(nuqjax, name)
    if inspect.isclass(public) or inspect.isfunction(public):
        assert "\n>>> " in (inspect.getdoc(public) or "")


def test_importing_nuqjax_needs_the_core_dependencies_only():
    optional = {
        "flax",
        "optax",
        "matplotlib",
        "equinox",
        "sklearn",
        "PIL",
        "tensorflow_datasets",
        "constriction",
        "orbax",
        "h5py",
        "msgpack",
        "shtab",
        "jax2onnx",
        "onnx",
    }
    script = f"import sys, nuqjax; print(*({optional!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()


LIBRARY_TESTS = sorted(path for path in Path(__file__).parent.glob("*.py") if path.name != Path(__file__).name)


@pytest.mark.parametrize("path", LIBRARY_TESTS, ids=lambda path: path.name)
def test_the_tests_of_the_library_need_no_experiments(path):
    """Not in the programs that they run either."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith(("from experiments", "import experiments"))] == []
