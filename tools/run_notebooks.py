"""Run notebooks from top to bottom and save what they show.

python tools/run_notebooks.py                    all of them
python tools/run_notebooks.py nbs/80_run.ipynb   some

Cells with the flags of `tst_flags` in settings.ini are left out and keep their outputs; with
`--slow` before the names, those with that flag run too.
"""

import os
import re
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


class FlaggedClient(NotebookClient):
    """Runs all cells but those with one of `flags`."""

    flags = ()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        words = re.findall(r"^#\|\s*(\w+(?:: false)?)\s*$", cell.source, flags=re.M)
        if set(words) & {*self.flags, "eval: false"}:
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def tidy(output):
    """An output as it should be saved, or None: no stderr, no widgets without state."""
    if output.get("name") == "stderr":  # progress bars, and warnings that name folders
        return None
    if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
        return None
    return output


def run(path, flags):
    """Execute one notebook in place."""
    notebook = nbformat.read(path, as_version=4)
    client = FlaggedClient(notebook, timeout=1800, kernel_name="python3", coalesce_streams=True)
    client.flags, client.resources = flags, {"metadata": {"path": str(path.parent)}}
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in map(tidy, cell.outputs) if output]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
            cell.metadata.pop("execution", None)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)


def main(paths):
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    flags = set(settings["DEFAULT"]["tst_flags"].split())
    if "--slow" in paths:
        flags, paths = flags - {"slow"}, [path for path in paths if path != "--slow"]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    everything = sorted((ROOT / "nbs").rglob("[!.]*.ipynb"))
    for path in map(Path, paths) if paths else everything:
        start = time.monotonic()
        run(path.resolve(), flags)
        print(f"{time.monotonic() - start:5.0f} s  {path.name}", flush=True)
    clean = Path(sys.executable).parent / "nbdev_clean"
    subprocess.run([clean], cwd=ROOT, check=True)  # nosec B603 # a tool of this environment


if __name__ == "__main__":
    main(sys.argv[1:])
