"""Break the scripts on purpose, one fault at a time, and see that a test notices each.

Every line of tests/mutations.txt names a file, the text to replace, its replacement, and the test that must fail. The
faults are planted in a copy of the repository, so that nothing is left behind when this is interrupted.

    python tests/mutants.py             # every fault; exit code 1 if any goes unnoticed
    python tests/mutants.py 3 7         # only the third and the seventh
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = ROOT / "tests" / "mutations.txt"
LEFT_OUT = (".git", ".venv*", "outputs", "checkpoints", "quantized_models", "__pycache__", "wandb")


def read_mutations() -> list[list[str]]:
    """Return [file, old text, new text, test] of each fault. Lines that begin with # are comments."""
    lines = [line for line in MUTATIONS.read_text().splitlines() if line.strip() and not line.startswith("#")]
    return [[field.strip() for field in line.split(" @@ ")] for line in lines]


def run_test(folder: Path, test: str) -> bool:
    """Return whether a test passes in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode not in (0, 1):  # a test that does not exist catches nothing
        sys.exit(f"error: pytest could not run {test}:\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> int:
    mutations = read_mutations()
    chosen = [int(number) for number in sys.argv[1:]] or range(1, len(mutations) + 1)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for number in chosen:
            name, old, new, test = mutations[number - 1]
            script = folder / name
            right = script.read_text()
            if right.count(old) != 1:
                sys.exit(
                    f"error: mutation {number}: {name} has {right.count(old)} places with the text {old!r}, not one."
                )
            script.write_text(right.replace(old, new))
            noticed = not run_test(folder, test)
            script.write_text(right)
            unnoticed += not noticed
            print(f"{number:3}  {'noticed  ' if noticed else 'UNNOTICED'}  {name}: {old}  ->  {new}", flush=True)
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
