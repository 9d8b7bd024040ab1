"""A table of rows that a run on a GPU brought back, and benchmarks/results/<gpu>.jsonl.

python benchmarks/gpu/record.py FOLDER          prints the table of FOLDER/rows.jsonl
python benchmarks/gpu/record.py FOLDER --keep   also appends the times to benchmarks/results/, with commit and versions
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rows import read

ROOT = Path(__file__).resolve().parents[2]


def lines(rows: list[dict]) -> Iterator[str]:
    """Versions, failures, and times with the percentage of the ceiling: bytes over the rate of a copy, or FLOP over the
    rate of a matrix product of the same dtype, whichever takes longer."""
    latest = {(row["part"], row["name"]): row for row in rows}
    of_run = latest.get(("versions", "versions"), {})
    yield " ".join(f"{key}={of_run.get(key)}" for key in ("gpu", "torch", "triton", "python", "date"))
    ceilings = _ceilings(latest)
    yield " ".join(f"{name}: {rate / 1e12:.3g} T{unit}/s" for name, (rate, unit) in ceilings.items())
    yield f"{'':58}{'ms':>10}{'host us':>9}{'TB/s':>7}{'TFLOP/s':>9}{'ceiling':>9}"
    for (part, name), row in latest.items():
        if "ms" in row:
            share = _floor_ms(row, ceilings)
            tera = [row.get(key, 0) / row["ms"] / 1e9 for key in ("bytes", "flops")]
            cells = [f"{row['ms']:10.4f}", f"{row['host_us']:9.0f}" if "host_us" in row else f"{'':9}"]
            cells += [f"{rate:{width}.2f}" if rate else " " * width for rate, width in zip(tera, (7, 9), strict=True)]
            cells.append(f"{share / row['ms']:9.1%}" if share else f"{'':9}")
            yield f"{part + ': ' + name:58}{''.join(cells)}{'' if row['how'] == 'graph' else '  ' + row['how']}"
    correct = [row for (part, _), row in latest.items() if part == "correct" and ("worst" in row or "moved" in row)]
    yield f"correct: {sum('failed' not in row for row in correct)} of {len(correct)}"
    for (part, name), row in latest.items():
        if part == "tests" and name == "counts":
            yield f"tests: {row}"
        for problem in ("error", "failed", "skipped"):
            if problem in row:
                yield f"{problem}: {part}: {name}: {row[problem]}"


def _ceilings(latest: dict) -> dict[str, tuple[float, str]]:
    """Bytes and FLOP per second that the device reached."""
    found = {}
    for name, key, unit in (
        ("copy", "bytes", "B"),
        ("product bfloat16", "flops", "FLOP"),
        ("product float32", "flops", "FLOP"),
    ):
        row = latest.get(("times", name), {})
        if "ms" in row:
            found[name] = (row[key] / row["ms"] * 1e3, unit)
    return found


def _floor_ms(row: dict, ceilings: dict[str, tuple[float, str]]) -> float:
    copy, product = (ceilings.get(name, (0, ""))[0] for name in ("copy", f"product {row.get('dtype')}"))
    times = [row.get(key, 0) / rate * 1e3 for key, rate in (("bytes", copy), ("flops", product)) if rate]
    return max(times, default=0.0)


def results(rows: list[dict], commit: str) -> Iterator[dict]:
    """Rows as benchmarks/results/ has them: seconds, and which commit, versions and device they are of."""
    latest = {(row["part"], row["name"]): row for row in rows}
    of_run, ceilings = latest[("versions", "versions")], _ceilings(latest)
    provenance = {key: of_run[key] for key in ("torch", "triton", "date")} | {"commit": commit}
    for (part, name), row in latest.items():
        if part == "times" and "op" in row and "ms" in row:
            yield {
                **{key: row[key] for key in ("op", "shape", "dtype")},
                "direction": name.rpartition(" ")[2],
                "allocator": "default",
                "backend": "tritonkern",
                **{key: row[value] / 1e3 for key, value in (("median", "ms"), ("p20", "p20"), ("p80", "p80"))},
                **{key: row[key] for key in ("first_call", "peak_memory", "bytes", "flops", "host_us")},
                "floor": _floor_ms(row, ceilings) / 1e3,
                "over_ours": 1.0,
                **provenance,
            }


def main(folder: Path, keep: bool) -> None:
    rows = read(folder)
    print("\n".join(lines(rows)))
    if not keep:
        return
    from parts import source_hash

    of_run = next(row for row in rows if row["part"] == "versions")
    if "gpu" not in of_run:
        sys.exit("these rows are not of a GPU")
    if of_run["source"] != source_hash():
        sys.exit("tritonkern/ is not what these rows are of; check out their commit first")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"[^a-z0-9]+", "-", of_run["gpu"].lower()).strip("-")
    target = ROOT / "benchmarks" / "results" / f"{name}.jsonl"
    with open(target, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in results(rows, commit))
    print(f"appended to {target}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["--keep"]):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), len(sys.argv) == 3)
