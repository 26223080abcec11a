"""PAPERS.md names all of the papers, and it and the code name each other."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(ROOT.glob("*.py"))
TAGGED = MODULES + sorted(ROOT.glob("benchmarks/*.py"))
TAG = re.compile(r"\[((?:AVQ|DDM) (?:(?:Eq|Tab|Sec|App|Fig)\. [A-Z0-9][0-9.]*|App\.))\]")
TAG_BEGINS = re.compile(r"\[(?:AVQ|DDM)\b")

# Read from the two papers by hand: the last number of each kind, and every section with a method or
# an experiment. AVQ has Appendices A to D; DDM's one appendix has no letter.
LAST = {"AVQ Eq.": 11, "AVQ Fig.": 7, "AVQ Tab.": 10, "DDM Eq.": 24, "DDM Fig.": 12, "DDM Tab.": 3}
SECTIONS = {"AVQ Sec.": "3.1 3.2 4 4.1 4.2 4.3 4.4", "AVQ App.": "A B C D",
            "DDM Sec.": "2.1 2.2 3.1 3.2 4.1 4.2 4.3 4.4"}
OF_THE_PAPERS = {"DDM App.", *(f"{kind} {n}" for kind, last in LAST.items()
                               for n in range(1, last + 1)),
                 *(f"{kind} {n}" for kind, numbers in SECTIONS.items() for n in numbers.split())}


def tables(letter):
    """The tables of PAPERS.md's section (letter), each a list of rows, each a list of cells."""
    text = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    section = re.search(rf"^## \({letter}\).*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[0]
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in rows.splitlines()[2:]]
            for rows in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)]


def table(letter):
    """The rows of all tables of PAPERS.md's section (letter)."""
    return [row for rows in tables(letter) for row in rows]


def definitions(tree, lines, prefix=""):
    """(name, first line, last line) of everything named in a module, with the comments above it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name, above = node.name, [d.lineno for d in node.decorator_list]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name, above = getattr(target, "id", "?"), []
        else:
            continue
        first = min([node.lineno, *above])
        while first > 1 and lines[first - 2].lstrip().startswith("#"):
            first -= 1
        yield prefix + name, first, node.end_lineno
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, lines, f"{prefix}{name}.")


def tags_of(path):
    """{(tag, "file.py:Name")}; "file.py" alone where the tag stands outside every definition."""
    file = f"{'benchmarks/' * (path.parent.name == 'benchmarks')}{path.name}"
    lines = path.read_text(encoding="utf-8").splitlines()
    known = list(definitions(ast.parse("\n".join(lines)), lines))
    found = set()
    for number, line in enumerate(lines, 1):
        holders = [(last - first, name) for name, first, last in known if first <= number <= last]
        place = f"{file}:{min(holders)[1]}" if holders else file
        found |= {(tag, place) for tag in TAG.findall(line)}
    return found


def mapped():
    """{(tag, "file.py:Name")} of table (b)."""
    return {(tag, place) for tags, places, *_ in table("b")
            for tag in TAG.findall(tags) for place in re.findall(r"`([^`]+)`", places)}


def expanded(cell):
    """The references of a cell of (d), such as "DDM Sec. 2.1; DDM Eq. 1-6, 8": DDM Eq. 1, ..."""
    for reference in cell.split("; "):
        kind, numbers = re.fullmatch(r"((?:AVQ|DDM) \w+\.) ?(.*)", reference).groups()
        for number in numbers.split(", "):
            first, _, last = number.partition("-")
            every = range(int(first), int(last) + 1) if last else [number]
            yield from (f"{kind} {each}".strip() for each in every)


def not_here():
    """{what table (d) lists: whether it says "partly"}."""
    listed = [(reference, cells[0].startswith("partly: ")) for cells in table("d")
              for reference in expanded(cells[0].removeprefix("partly: "))]
    assert len(dict(listed)) == len(listed), "a reference stands twice in PAPERS.md (d)"
    return dict(listed)


def test_all_that_the_papers_number_is_mapped_or_said_not_to_be_here_or_partly_both():
    mapped_tags, listed = {tag for tag, _ in mapped()}, not_here()
    partly = {reference for reference, part in listed.items() if part}
    assert mapped_tags | listed.keys() == OF_THE_PAPERS
    assert mapped_tags & listed.keys() == partly


@pytest.mark.parametrize("path", TAGGED, ids=lambda path: path.name)
def test_every_tag_is_whole_on_one_line_and_of_the_one_form(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert len(TAG_BEGINS.findall(line)) == len(TAG.findall(line)), (
            f"{path.name}:{number}: a tag is [AVQ Eq. 4], one reference each, on one line: {line}")


def test_every_tag_in_the_code_is_in_the_map():
    in_code = set().union(*(tags_of(path) for path in TAGGED))
    missing = sorted(in_code - mapped())
    assert not missing, f"tags that PAPERS.md (b) does not map: {missing}"


def test_every_row_of_the_map_names_a_definition_that_carries_its_tag():
    in_code = set().union(*(tags_of(path) for path in TAGGED))
    stale = sorted(mapped() - in_code)
    assert not stale, f"PAPERS.md (b) maps what the code does not say: {stale}"
    assert all(TAG.findall(row[0]) and "`" in row[1] for row in table("b"))


def deviations_of(path):
    """{"D1", "D2", ...}: those that the module marks by `deviation D1` or `deviations D1 D2`."""
    marks = re.findall(r"\bdeviations?((?: D\d+)+)", path.read_text(encoding="utf-8"))
    return {name for mark in marks for name in mark.split()}


def told():
    """The ids of the deviations, those that change results first."""
    return [row[0] for row in table("c")]


def in_order(ids):
    """Whether the numbers rise and none comes twice; a number keeps its meaning: gaps may be."""
    numbers = [int(name[1:]) for name in ids]
    return numbers == sorted(set(numbers))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_deviation_marked_in_the_code_is_told(path):
    untold = deviations_of(path) - set(told())
    assert not untold, f"{path.name} marks {sorted(untold)}, not in PAPERS.md (c)"


def test_every_deviation_that_is_told_is_marked_in_the_code():
    marked = set().union(*(deviations_of(path) for path in MODULES))
    missing = [name for name in told() if name not in marked]
    assert not missing, f"PAPERS.md tells of {missing}, which no module marks: deviation D3"


def test_no_deviation_is_told_twice_and_each_has_a_row_with_its_switch_and_tests():
    ids = [row[0] for row in table("e")]
    assert all(in_order(row[0] for row in rows) for letter in "ce" for rows in tables(letter))
    assert sorted(ids) == sorted(told())


def test_every_deviation_names_tests_that_exist():
    written = {node.name for path in (ROOT / "tests").glob("**/*.py")
               for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
               if isinstance(node, ast.FunctionDef)}
    for row in table("e"):
        named = re.findall(r"`(test_\w+)`", row[-1])
        assert named or row[-1].startswith("none:"), f"{row[0]} names neither a test nor a reason"
        assert set(named) <= written, f"{row[0]}: no such test: {set(named) - written}"


def test_the_rows_of_each_table_have_as_many_cells_as_its_head():
    assert {letter: {len(row) for row in table(letter)} for letter in "abcdef"} == {
        "a": {4}, "b": {4}, "c": {5}, "d": {3}, "e": {3}, "f": {2}}


def test_the_files_that_the_table_of_symbols_points_to_exist():
    for symbol, _, _, places in table("a"):
        for place in re.findall(r"`(\w+\.py)`", places):
            assert (ROOT / place).exists(), f"{symbol}: {place}"


def test_no_file_of_the_readmes_reading_path_needs_a_later_one():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## The reading path.*?^## ", text, re.MULTILINE | re.DOTALL)[0]
    path = list(dict.fromkeys(re.findall(r"\[`(\w+)\.py`\]", section)))
    assert len(path) >= 15
    for place, name in enumerate(path):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        needed = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        later = needed & set(path[place:])
        assert not later, f"{name}.py is read before {later}, which it imports"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_file_of_the_repository_leads_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not dead, f"{path.name} links to {dead}, which are not there"


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")), ids=lambda path: path.name)
def test_every_link_to_a_heading_finds_it(path):
    for file, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", path.read_text(encoding="utf-8")):
        text = (ROOT / (file or path.name)).read_text(encoding="utf-8")
        heads = re.findall(r"^#+ (.*)", text, re.MULTILINE)
        slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
        assert anchor in slugs, f"{path.name} links to #{anchor}, no heading of {file or path.name}"


def test_the_readme_is_one_page_of_at_most_170_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_map_says_which_notebooks_show_a_tag():
    sources = {path.name[0]: path.read_text(encoding="utf-8")
               for path in sorted((ROOT / "notebooks").glob("[0-9]_*.py"))}
    assert sources
    for tags, _, _, seen in table("b"):
        found = [number for number, text in sources.items()
                 if set(TAG.findall(text)) & set(TAG.findall(tags))]
        assert seen == ", ".join(found), tags
