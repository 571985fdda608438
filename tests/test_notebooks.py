"""Every notebook runs, cell by cell, and what is kept in it is the output of these cells."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Of what they call, each is tested on all versions; they are a user's programs, whose models promote.
pytestmark = [pytest.mark.versionless, pytest.mark.promotes]

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

# Runs what it is given, one cell after another, in one namespace; the last expression of a cell is evaluated as any.
RUN = """
import json, subprocess, sys
import matplotlib
matplotlib.use("Agg")
def shell(command):
    subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True)
namespace = {"__name__": "__main__", "shell": shell}
for number, source in enumerate(json.loads(sys.stdin.read())):
    exec(compile(source, f"cell {number}", "exec"), namespace)
"""


def cells(path, kind="code"):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def plain(source):
    """A cell as Python: `!command` runs it by the shell."""
    return re.sub(r"^!(.*)$", lambda match: f"shell({match[1]!r})", source, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    install, *code = ["".join(cell["source"]) for cell in cells(path)]
    assert "%pip install" in install
    assert not any(line.startswith("%") for source in code for line in source.splitlines())
    path_with_scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps([plain(source) for source in code]), text=True, check=True, cwd=tmp_path,
        env=os.environ | {"PATH": path_with_scripts, "TMPDIR": str(tmp_path)},
    )  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_name_no_machine(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in outputs]
    assert not re.search(r"/(home|root|tmp|usr|opt|Users|work|mnt|var)/", "\n".join(texts))
    assert not any("execution" in cell["metadata"] for cell in code)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
            assert target.startswith("https://") or (FOLDER / target).exists(), target
