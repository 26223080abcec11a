"""Build the notebooks from their sources: N_title.py -> N_title.ipynb, run, with outputs.

    python notebooks/build.py [N ...]               build these, or all
    python notebooks/build.py --figures DIR         every figure at 200 dpi, and captions.md
    python notebooks/build.py --grade FILE.ipynb    run a student's file, count its checks

jupytext reads the cells, nbclient runs them; `make notebooks` installs both. In a source the lines
between `# solution` and `# end` solve an exercise. The notebook has `...` in their place. A cell
whose first line is `# figure: NAME. WHAT TO SEE` draws a figure.
"""

import argparse
import base64
import io
import re
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
STYLE = 'plt.style.use("course.mplstyle")'               # a line of every source's first cells
FIGURE = re.compile(r"# figure: ([\w-]+)\. (.*(?:\n# .*)*)")


def student(source):
    """Replace the solutions by `...`."""
    return re.sub(r"^( *)# solution\n.*?^ *# end$", r"\1...", source, flags=re.M | re.S)


def run(notebook, seconds=600):
    """Execute a notebook in this folder, in place. Raises CellExecutionError."""
    NotebookClient(notebook, timeout=seconds, kernel_name="python3",
                   resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


def smaller(png):
    """Reduce a PNG, in base64, to 256 colours."""
    file, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png)))
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def build(source):
    """Write the student's notebook beside its source."""
    notebook = run(jupytext.reads(student(source.read_text(encoding="utf-8")), fmt="py:percent"))
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", {}  # no random names, no times
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python",
                                        "name": "python3"}, "language_info": {"name": "python"}}
    if source.name.startswith("2"):                       # the film in its text
        (HERE / "film.gif").replace(HERE / "codebook.gif")
    target = source.with_suffix(".ipynb")
    jupytext.write(notebook, target)
    print(f"{target.name}: {target.stat().st_size // 1000} kB")


def figures(source, folder):
    """Write a source's figures; return their captions, in Markdown."""
    text = source.read_text(encoding="utf-8")
    notebook = run(jupytext.reads(text.replace(STYLE, f'{STYLE}\nplt.rcParams["figure.dpi"] = 200'),
                                  fmt="py:percent"))
    captions = []
    for cell in notebook.cells:
        drawn = [output.data["image/png"] for output in cell.get("outputs", ())
                 if "image/png" in output.get("data", {})]
        if (head := FIGURE.match(cell.source)) and drawn:
            name = f"{source.name[0]}_{head[1]}.png"
            (folder / name).write_bytes(base64.b64decode(drawn[-1]))
            captions.append(f"**{name}** " + head[2].replace("\n# ", " "))
    return captions


def grade(path):
    """Run a student's notebook to its end and print which checks pass."""
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=600, kernel_name="python3", allow_errors=True,
                   resources={"metadata": {"path": str(HERE)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells
                      for output in cell.get("outputs", ()))
    checks = re.findall("^[✓○✗] .*$", printed, re.M)
    print(*checks, f"{sum(line[0] == '✓' for line in checks)} of {len(checks)}", sep="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("numbers", nargs="*", metavar="N", help="of the notebooks (all)")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write the figures instead")
    parser.add_argument("--grade", type=Path, metavar="FILE", help="grade a student's file instead")
    args = parser.parse_args()
    if args.grade:
        return grade(args.grade)
    sources = [path for path in sorted(HERE.glob("[0-9]_*.py"))
               if not args.numbers or path.name[0] in args.numbers]
    if not args.figures:
        return [build(source) for source in sources]
    args.figures.mkdir(parents=True, exist_ok=True)
    captions = [caption for source in sources for caption in figures(source, args.figures)]
    (args.figures / "captions.md").write_text("\n\n".join(captions) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
