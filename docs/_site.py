"""MkDocs hooks: pages made from the READMEs of the repository, from docstrings and from the measured rows.

Nothing of the package is imported, so that the site is built without PyTorch.
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tritonkern"
ROWS = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads-avx2.jsonl"
FUNCTIONS = {
    "temporal_window_attention": ["temporal_window_attention"],
    "correlation_soft_argmax": ["correlation_soft_argmax", "soft_argmax_2d"],
    "local_correlation": ["local_correlation", "local_correlation_linear", "correlation_pyramid"],
    "track_attention": ["track_sample_attention", "track_splat_attention"],
    "temporal_mixer": ["temporal_mixer"],
    "gated_linear_recurrence": ["gated_linear_recurrence"],
    "query_key_matching": [
        "query_key_matching",
        "query_key_cost",
        "attention_row_statistics",
        "frame_local_attention",
    ],
    "temporal_adapter": [],
    "full_attention": [],
}
"""The public functions of each operation."""
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tritonkern/weights/nano.md": "weights/nano.md",
    "tritonkern/weights/chrono-nano.md": "weights/chrono-nano.md",
} | {f"tritonkern/ops/{name}/README.md": f"operations/{name}.md" for name in FUNCTIONS}
"""Where the pages of the repository beside docs/ are in the site."""
REFERENCE = {"nn": "Layers", "models": "Models", "tracking": "Tracking", "integrations": "Patches"}
_SECTIONS = ("Args", "Returns", "Raises")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are not in docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if page.startswith("operations/"):
            text = operation_page(Path(page).stem, text)
        files.append(File.generated(config, page, content=text))
    for package, title in REFERENCE.items():
        content = f"# {title}\n\n" + "\n".join(package_docs(package))
        files.append(File.generated(config, f"reference/{package}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links between files of the repository into links between pages; a link to anything absent is an error."""
    sources = {target: source for source, target in PAGES.items()}
    here = ROOT / sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    at = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = Path(os.path.normpath(here.parent / path))
        if not file.exists():
            raise PluginError(f"{here.relative_to(ROOT)} links to {target}, which does not exist")
        name = file.relative_to(ROOT).as_posix()
        if file.is_relative_to(ROOT / "docs") and file.suffix != ".py":
            found = file.relative_to(ROOT / "docs").as_posix()
        elif name in PAGES:
            found = PAGES[name]
        else:
            return f"{text} (`{name}`)" if name not in text else text  # in the repository only
        return f"{mark}[{text}]({os.path.relpath(found, at)}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", moved, markdown)


def operation_page(operation: str, readme: str) -> str:
    """The operation's README, its public functions before the formula and its measured rows at the end."""
    functions = "".join(f"\n{text}\n" for name in FUNCTIONS[operation] for text in [function_docs(name)])
    first = re.search(r"^## ", readme, re.MULTILINE)
    place = first.start() if first else len(readme)
    example = re.search(r"^## Example\n.*?(?=^## )", readme, re.MULTILINE | re.DOTALL)
    if example:  # the example, then what it calls
        place = example.end()
    parts = [readme[:place]]
    if functions:
        parts.append(f"## Functions\n{functions}\n")
    parts += [readme[place:].rstrip(), "\n\n", measured(operation)]
    return "".join(parts)


def measured(operation: str) -> str:
    """The recorded rows of `operation`, as benchmarks/table.py prints them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from table import lines

    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    rows = [row for row in rows if row["op"] == operation and "allocator" in row]
    if not rows:
        return ""
    table = "\n".join(lines(rows))
    return f"## Recorded rows\n\nOn the machine of `{ROWS.stem}`, which is one virtual CPU.\n\n```text\n{table}\n```\n"


def function_docs(name: str) -> str:
    """The public function `name` of `tritonkern.functional`."""
    for path in sorted((PACKAGE / "functional").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return f"### tritonkern.{name}\n\n{signature(node, f'tritonkern.{name}')}\n\n{docstring(node)}"
    raise PluginError(f"tritonkern.functional has no function {name}")


def package_docs(package: str) -> Iterator[str]:
    """What `tritonkern.<package>` exports: classes with their methods, functions."""
    tree = ast.parse((PACKAGE / package / "__init__.py").read_text())
    named = [node for node in tree.body if isinstance(node, ast.Assign)]
    exported = [ast.literal_eval(node.value) for node in named if getattr(node.targets[0], "id", "") == "__all__"]
    public = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    homes = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    yield docstring(tree)
    for name in exported[0] if exported else public:
        home = homes.get(name, f"tritonkern.{package}")
        path = ROOT / Path(*home.split("."))
        body = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()).body
        for node in body:
            if getattr(node, "name", None) != name or not ast.get_docstring(node):
                continue
            yield f"## {name}\n"
            if isinstance(node, ast.FunctionDef):
                yield f"{signature(node, f'tritonkern.{package}.{name}')}\n\n{docstring(node)}\n"
            elif isinstance(node, ast.ClassDef):
                yield from class_docs(node, f"tritonkern.{package}.{name}")


def class_docs(node: ast.ClassDef, path: str) -> Iterator[str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    made = next((item for item in methods if item.name == "__init__"), None)
    yield f"{signature(made, path) if made else f'```python{chr(10)}class {path}{chr(10)}```'}\n\n{docstring(node)}\n"
    for method in methods:
        shown = method.name == "__call__" or not method.name.startswith("_")
        if shown and ast.get_docstring(method):
            yield f"### {node.name}.{method.name}\n\n{signature(method, method.name)}\n\n{docstring(method)}\n"


def signature(node: ast.FunctionDef, name: str) -> str:
    """As Python, an argument per line where it is long."""
    arguments = ast.unparse(node.args).removeprefix("self, ").removeprefix("self").removeprefix("cls, ")
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    text = f"{name}({arguments}){result}"
    if len(text) > 90:
        split = re.split(r", (?![^\[(]*[\])])", arguments)
        text = f"{name}(\n" + "".join(f"    {part},\n" for part in split) + f"){result}"
    return f"```python\n{text}\n```"


def docstring(node: Any) -> str:
    """A docstring of this repository's form, as Markdown."""
    lines, out, section = (ast.get_docstring(node) or "").splitlines(), [], ""
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if line.rstrip(":") in _SECTIONS and line.endswith(":"):
            section = line.rstrip(":")
            out += ["", {"Args": "**Arguments**"}.get(section, f"**{section}**"), ""]
        elif section and line.startswith("    "):
            entry = line[4:]
            if section != "Returns" and not entry.startswith(" ") and (match := re.match(r"([\w, *]+): (.*)", entry)):
                out.append(f"- `{match[1]}`: {match[2]}")
            elif section != "Returns" and entry.startswith(" "):
                out.append(f"  {entry.strip()}")
            else:
                out.append(entry)
        elif line.rstrip().endswith("::"):
            section = ""
            if line.strip() != "::":
                out.append(line.rstrip()[:-1])
            block = []
            while index < len(lines) and (not lines[index].strip() or lines[index].startswith("    ")):
                block.append(lines[index])
                index += 1
            out += ["", "```text", textwrap.dedent("\n".join(block)).strip("\n"), "```", ""]
        else:
            section = section if not line.strip() else ""
            out.append(line)
    return "\n".join(out)
