"""What a reader relies on: equations that can be found, introductions that run, few packages."""
import ast
import importlib
import operator
import re
import sys

import pytest
from conftest import ROOT

EQUATIONS = {"transdiff": 18, "dar": 8, "madformer": 6}  # numbered in each paper
PACKAGES = {"torch", "numpy", "PIL", "tqdm", *sys.stdlib_module_names}
PACKAGES -= {"resource", "fcntl"}  # which Windows does not have
ROOMS = {  # what else each file may import; safetensors only where it is wanted and installed
    "common": {"safetensors"}, "transdiff": {"common"}, "dar": {"common"}, "madformer": {"common"},
    "fid": {"common"}, "train": {"common", "fid"}, "sample": {"common"}}


def source_of(name):
    """Return the text of a file."""
    return (ROOT / f"{name}.py").read_text()


def map_of(name):
    """Return the paragraph "Where" of the docstring at the top of a model file."""
    return source_of(name).partition("\nWhere ")[2].partition("\nDiffers ")[0]


def numbers(text):
    """Return the equations named in a text: "Eq. 5", "Eq. 1, 2 and 7", "Eq. 2 to Eq. 5"."""
    found = set()
    for phrase in re.findall(r"Eq\.\s(\d+(?:(?:,|\sto|\sand)\s(?:Eq\.\s)?\d+)*)", text):
        previous = 0
        for to, number in re.findall(r"(to)?\s?(?:Eq\.\s)?(\d+)", phrase):
            found |= set(range(previous + 1 if to else int(number), int(number) + 1))
            previous = int(number)
    return found


def test_phrases_about_equations_are_understood():
    """A parser that finds too much would hide a missing equation."""
    assert numbers("Eq. 1, 2 and 4: 9. Eq. 6\nto Eq. 8, as (B, 3)") == {1, 2, 4, 6, 7, 8}


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_of_the_paper_can_be_found(name):
    """It is tagged on the line that computes it, or the map at the top of the file names it."""
    tags = re.findall(r"# (Eq\..*)", source_of(name))
    found = numbers("\n".join([map_of(name), *tags]))
    assert found == set(range(1, EQUATIONS[name] + 1))


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_map_leads_to_methods_that_exist(name):
    """A method that was renamed leaves the reader searching."""
    module = importlib.import_module(name)
    for method in re.findall(r"[A-Z]\w+\.[a-z]\w+", map_of(name)):
        operator.attrgetter(method)(module)


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_models_introduce_themselves(in_process, capsys, name):
    """All presets with their parameters, and the shapes of a batch on its way."""
    module = importlib.import_module(name)
    in_process(module)
    said = capsys.readouterr().out
    assert all(preset in said for preset in module.PRESETS)
    assert re.search(r"Linear +\(2, \d+, \d+\)", said)


@pytest.mark.parametrize("name", ROOMS)
def test_only_the_named_packages_are_imported(name):
    """Everything installs with four packages, and no model file needs another."""
    imported = set()
    for node in ast.walk(ast.parse(source_of(name))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= PACKAGES | ROOMS[name]


def test_the_readme_points_at_the_right_lines():
    """A link such as [`forward`](dar.py#L370) leads to a definition of that name."""
    readme = (ROOT / "README.md").read_text()
    links = re.findall(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)\)", readme)
    assert len(links) > 10
    for name, file, number in links:
        line = (ROOT / file).read_text().splitlines()[int(number) - 1]
        assert re.match(rf"\s*(def|class) {name.split('.')[-1]}\b", line), (name, file, number)
