"""Keep the code that the scripts share word for word the same, since they copy it instead of importing it.

A shared block is one top-level function, class or constant. It is written in one script, and every other script that
needs it carries it under a line `# Copied from <script>.<name>`. Reported: a copy that differs from its source, a marker
that points nowhere or at another copy, and two scripts that define one name without a marker.

    python tests/check_copies.py            # report; exit code 1 if anything is wrong
    python tests/check_copies.py --fix      # overwrite the copies that drifted
"""

import argparse
import ast
import re
from dataclasses import dataclass
from pathlib import Path

MARKER = re.compile(r"# Copied from (\w+)\.(\w+)$")
FREE = {"parse_args", "main"}  # every script has its own


@dataclass
class Block:
    """A top-level definition: its file, name, lines [start, end) without marker, text, and the marker's target."""

    path: Path
    name: str
    start: int
    end: int
    text: str
    source: tuple[str, str] | None


def read_blocks(path: Path) -> list[Block]:
    """The functions, classes and constants that a file defines at its top level."""
    lines = path.read_text().splitlines()
    blocks = []
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, start = node.targets[0].id, node.lineno - 1
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name, start = node.target.id, node.lineno - 1
        else:
            continue
        marker = MARKER.match(lines[start - 1]) if start else None
        text = "\n".join(lines[start : node.end_lineno])
        blocks.append(Block(path, name, start, node.end_lineno, text, marker and marker.groups()))
    return blocks


def check(paths: list[Path], fix: bool = False) -> list[str]:
    """Return one sentence for each fault found in `paths`; with `fix`, drifted copies are mended and not reported."""
    faults = []
    blocks = [block for path in paths for block in read_blocks(path)]
    written = {(block.path.stem, block.name): block for block in blocks if not block.source}
    drifted = []
    for block in blocks:
        here = f"{block.path.name}:{block.start + 1} {block.name}"
        if block.source and block.source not in written:
            faults.append(f"{here} is marked as copied from {'.'.join(block.source)}, which is written in no script.")
        elif block.source and block.source[1] != block.name:
            faults.append(f"{here} is marked as copied from {'.'.join(block.source)}, which has another name.")
        elif block.source and written[block.source].text != block.text:
            drifted.append(block)
    if fix:
        for block in sorted(drifted, key=lambda block: -block.start):  # from the bottom, so that line numbers hold
            lines = block.path.read_text().splitlines()
            lines[block.start : block.end] = written[block.source].text.splitlines()
            block.path.write_text("\n".join(lines) + "\n")
    else:
        faults += [
            f"{block.path.name}:{block.start + 1} {block.name} differs from {'.'.join(block.source)}; "
            "change the source and run make fix-copies."
            for block in drifted
        ]
    owners: dict[str, list[str]] = {}
    for stem, name in written:
        if name not in FREE:
            owners.setdefault(name, []).append(stem)
    for name, stems in owners.items():
        if len(stems) > 1:
            faults.append(f"{name} is written in {' and in '.join(sorted(stems))}; mark one as copied, or rename it.")
    return faults


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fix", action="store_true", help="overwrite drifted copies with their source")
    parser.add_argument("paths", nargs="*", type=Path, help="scripts to check (default: those of the repository)")
    args = parser.parse_args(argv)
    paths = args.paths or sorted(Path(__file__).resolve().parent.parent.glob("llava_*.py"))
    faults = check(paths, args.fix)
    for fault in faults:
        print(fault)
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
