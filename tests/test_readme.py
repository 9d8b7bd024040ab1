"""What the README and the pages of the documentation point at exists, and the operations' examples run."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATIONS = sorted((ROOT / "tritonkern" / "ops").glob("*/README.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *OPERATIONS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_pictures_exist(page):
    text = page.read_text()
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", target)]
    assert page.name != "README.md" or page.parent != ROOT or len(targets) > 3
    assert [target for target in targets if not (page.parent / target.split("#")[0]).exists()] == []
    assert not re.search(r"@[A-Z]+@", text)


@pytest.mark.parametrize("page", OPERATIONS, ids=lambda page: page.parent.name)
def test_examples_of_operations(page):
    blocks = re.findall(r"## Example\n\n```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == (page.parent.name != "full_attention")  # which has no public function
    for block in blocks:
        exec(compile(block, str(page), "exec"), {})


def test_every_public_function_and_operation_has_a_page():
    """The table in docs/_site.py, which needs MkDocs to be imported, is complete."""
    import tritonkern.functional

    text = (ROOT / "docs" / "_site.py").read_text()
    table = eval(re.search(r"^FUNCTIONS = (\{.*?^\})", text, re.MULTILINE | re.DOTALL)[1])
    assert sorted(table) == [page.parent.name for page in OPERATIONS]
    functions = {name for name in tritonkern.functional.__all__ if name[0].islower()}
    assert {name for names in table.values() for name in names} == functions
    nav = (ROOT / "mkdocs.yml").read_text()
    for page in (*(f"operations/{name}.md" for name in table), *(p.name for p in (ROOT / "docs").glob("*.md"))):
        assert f"{page}\n" in nav


def test_every_model_is_in_the_table_of_models():
    from tritonkern.models import MODELS

    text = (ROOT / "docs" / "models.md").read_text()
    assert set(re.findall(r"`([a-z0-9-]+)`(?=[^|]*\|)", text.split("## What")[0])) >= set(MODELS)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="MkDocs is not installed (the extra docs)")
def test_the_site_builds(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    page = (tmp_path / "operations" / "temporal_mixer.html").read_text()
    for part in ("tritonkern.temporal_mixer", "Arguments", "Data movement"):
        assert part in page


def test_the_packaged_weights_have_a_card():
    weights = list((ROOT / "tritonkern" / "weights").glob("*.safetensors"))
    assert weights
    for path in weights:
        card = path.with_suffix(".md").read_text()
        assert not re.search(r"@[A-Z]+@", card)
        assert path.stat().st_size < 8e6
