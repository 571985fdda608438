"""The wings of nuqjax: which may import which, in which order files stand in them, and what `import nuqjax` gives."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import nuqjax

PACKAGE = Path(nuqjax.__file__).parent
SOURCE = PACKAGE / "_src"
TESTS = Path(__file__).parent
EXPERIMENTS = TESTS.parent / "experiments"
ARRAYS = ("jax", "numpy")


class Wing(NamedTuple):
    """A folder of `nuqjax/_src`: its files from the ground up, each of which may import those before it."""

    files: str
    wings: str = ""  # that it may import, besides `platform`
    packages: tuple[str, ...] = ()  # besides the standard library, jax and numpy


# In the order of the flow: arrows point up this table only. The import of a name that only types need counts, too.
WINGS: dict[str, Wing] = {
    "platform": Wing("types compat meshes host rounding"),
    "leaf": Wing(
        "paths qformat words rows fixed_point packing matrix assign codebook_array check take codebooks shardings"
    ),
    "trace": Wing("traced interpret operations"),
    "knq": Wing(
        "rows/sorted rows/long "
        "search/priced_host search/windows_host search/dense_host search/dense search/priced search/search search/gaps "
        "proof/rows proof/path_host proof/path proof/mesh_row proof/proof "
        "run/error run/light run/levels run/host run/traced run/mesh knq",
        "leaf",
    ),
    "report": Wing("bars leaf_report trees render plot comparison report", "leaf", ("IPython", "matplotlib", "rich")),
    "kernels": Wing("after planes products product", "leaf"),
    "apply": Wing("contraction apply", "leaf trace kernels"),
    "fold": Wing("program chains solver fold", "leaf trace"),
    "fit": Wing("per_row steps grid enq leaf_on_mesh methods", "leaf knq"),
    "emulate": Wing(
        "formats program bounds sums parameters exact trace emulate presets measure calibrate",
        "leaf trace report",
        ("rich",),
    ),
    "store": Wing(
        "foreign dtypes file target write text entropy tree describe entry report layout place store compared",
        "leaf report",
        ("constriction",),
    ),
    "compress": Wing("rules stacks plan view levels level_format leaf compress", "leaf fit report store", ("rich",)),
    "export": Wing("program onnx_file", "leaf trace apply store", ("flatbuffers", "jax2onnx", "onnx")),
    "calibration": Wing(
        "fisher measures squares sweeps problem places level_formats stages rated solver parts "
        "convolutions uses flat programs progress second_moments pairs biases layouts layers sequential widths flow "
        "refine door",
        "leaf trace fit fold report store compress",
        ("optax", "rich"),
    ),
    "checkpoint": Wing(
        "tree names journal locate "
        "formats/safetensors formats/numpy formats/msgpack formats/orbax formats/hdf5 checkpoint convert "
        "results calibrated",
        "leaf report store compress calibration",
        ("flax", "h5py", "msgpack", "orbax"),
    ),
    "cli": Wing(
        "options parser process show compare commands", "leaf report compress checkpoint nuqjax", ("rich", "shtab")
    ),
}
SOURCES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
FACE = sorted(PACKAGE.glob("*.py"))


def place_of(module: str) -> tuple[str, str]:
    """`nuqjax._src.knq.rows.long` → `("knq", "rows/long")`."""
    wing, *file = module.removeprefix("nuqjax._src.").split(".")
    return wing, "/".join(file)


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def imported_modules(path: Path) -> set[str]:
    """Absolute dotted names of what a source file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["nuqjax" if node.level else "", node.module or ""]))
            for alias in node.names:  # a module of a package, or a name of a module
                inner = f"{base}.{alias.name}"
                is_module = inner in MODULES or base in ("nuqjax", "experiments")
                names.add(inner if is_module else base)
    return names


MODULES = {module_of(path) for path in SOURCES}


def test_the_table_and_the_package_name_the_same_files():
    found: dict[str, set[str]] = {wing: set() for wing in WINGS}
    for module in MODULES:
        wing, file = place_of(module)
        found.setdefault(wing, set()).add(file)
    assert found == {wing: set(row.files.split()) for wing, row in WINGS.items()}


def test_the_arrows_of_the_table_point_one_way():
    order = list(WINGS)
    order.insert(order.index("cli"), "nuqjax")  # the command line alone stands on the face
    for wing, row in WINGS.items():
        assert set(row.wings.split()) <= set(order[: order.index(wing)]), wing


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_file_imports_what_stands_before_it(path):
    wing, file = place_of(module_of(path))
    row = WINGS[wing]
    modules = imported_modules(path)
    inside = {place_of(name) for name in modules if name.startswith("nuqjax")}
    before = row.files.split()[: row.files.split().index(file)]
    assert {other for room, other in inside if room == wing} <= set(before)
    assert {room for room, _ in inside} - {wing} <= {"platform", *row.wings.split()}
    outside = {name.split(".")[0] for name in modules} - {"nuqjax"} - set(sys.stdlib_module_names)
    assert outside <= {*ARRAYS, *row.packages}


def test_no_public_name_is_that_of_a_module():
    """But for `calibration` and `types`, which are modules: nothing is hidden by them."""
    modules = {name for name in nuqjax.__all__ if inspect.ismodule(getattr(nuqjax, name))}
    assert {path.stem for path in FACE} & set(nuqjax.__all__) == modules


def test_the_face_has_no_work_of_its_own():
    """Besides the command line, it only hands on what stands in the wings."""
    for path in FACE:
        if path.stem not in ("cli", "__main__"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)], path.name


@pytest.mark.parametrize("path", [*SOURCES, *FACE], ids=module_of)
def test_what_releases_of_jax_name_differently_comes_from_compat(path):
    used = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    assert path.stem == "compat" or not used & {"jax.enable_x64", "jax.experimental.enable_x64"}


# The folders of `experiments`, each with those that it may import: arrows point up this table only.
FOLDERS = {
    "record": "",
    "networks": "",
    "data": "networks",
    "studies": "record networks data",
    "speed": "record networks data studies",
    "paper": "record networks data studies",
    "documents": "record speed paper",
}
COMMANDS = sorted(EXPERIMENTS.rglob("*.py"))
each_command = pytest.mark.parametrize("path", COMMANDS, ids=lambda path: str(path.relative_to(EXPERIMENTS)))


def test_every_experiment_stands_in_a_folder_of_the_table():
    assert {path.relative_to(EXPERIMENTS).parts[0] for path in COMMANDS} == {*FOLDERS, "__init__.py"}
    order = list(FOLDERS)
    assert all(set(row.split()) <= set(order[: order.index(folder)]) for folder, row in FOLDERS.items())


@each_command
def test_an_experiment_imports_the_folders_that_it_may(path):
    folder = path.relative_to(EXPERIMENTS).parts[0]
    imported = {name.split(".")[1] for name in imported_modules(path) if name.startswith("experiments.")}
    assert imported <= {folder, *FOLDERS.get(folder, "").split()}


@each_command
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


LIBRARY_TESTS = sorted(
    path
    for path in TESTS.rglob("*.py")
    if path != Path(__file__) and "experiments" not in path.relative_to(TESTS).parts
)


@pytest.mark.parametrize("path", LIBRARY_TESTS, ids=lambda path: str(path.relative_to(TESTS)))
def test_the_tests_of_the_library_need_no_experiments(path):
    """Not in the programs that they run either."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith(("from experiments", "import experiments"))] == []
