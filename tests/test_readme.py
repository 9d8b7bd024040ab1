"""What the README points at exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_links_and_pictures_exist():
    text = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert len(targets) > 3
    assert [target for target in targets if not (ROOT / target).exists()] == []
    assert not re.search(r"@[A-Z]+@", text)


def test_the_packaged_weights_have_a_card():
    weights = list((ROOT / "tritonkern" / "weights").glob("*.safetensors"))
    assert weights
    for path in weights:
        card = path.with_suffix(".md").read_text()
        assert not re.search(r"@[A-Z]+@", card)
        assert path.stat().st_size < 8e6
