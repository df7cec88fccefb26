"""Let faults happen to runs, and tell whether these go on bit for bit or say why not.

    python -m tests.faults --count 1000 --seed 0 --jobs 2

Each fault strikes at an operation of the file layer, drawn from the list that an undisturbed run announces, or
at the files that a killed run left. Then the run is taken up again, as its user would, until it ends. Prints how often
each ending came, and everything that is wrong; exits with 1 if anything is.
"""

import argparse
import collections
import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from tests.faults import runs

ERRORS = {"full disk": errno.ENOSPC, "read-only": errno.EROFS, "no permission": errno.EACCES, "disk error": errno.EIO}
KINDS = (
    "kill", "kill twice", "torn file", "full disk", "full for good", "read-only", "no permission", "disk error",
    "SIGTERM", "SIGINT", "flipped checkpoint", "cut checkpoint", "flipped finished checkpoint", "cut table",
    "stale checkpoint", "clock back", "clock forward", "two at once", "finished, taken up again",
)  # fmt: skip
ANEW = 3  # So often a run is taken up at most.


class Wrong(Exception):
    """A fault that was not survived rightly."""


class Case:
    """A folder in which one fault happens to one run."""

    def __init__(self, folder, stop, reference, operations, chance):
        self.folder, self.reference, self.operations, self.chance = folder, reference, operations, chance
        (folder / "config.yaml").write_text(runs.CONFIG % runs.STOPS[stop])
        self.words = ["fit", "--config", "config.yaml"]

    @property
    def run_folder(self):
        found = sorted((self.folder / "lightning_logs").glob("version_*"))
        return found[-1] if found else None

    @property
    def checkpoint(self):
        path = None if self.run_folder is None else self.run_folder / "checkpoints" / "last.ckpt"
        return path if path is not None and path.is_file() else None

    def strike(self, act, words=None):
        """Run until a fault strikes at some operation."""
        number = self.chance.randrange(len(self.operations))
        return runs.run(words or self.words, self.folder, partial(runs.at_operation, number, act))

    def kill(self):
        self.strike(lambda operation, size: os.kill(os.getpid(), signal.SIGKILL))

    def go_on(self, disturb=None):
        """Take the run up until it has ended; return the sentences that refused it on the way."""
        refused, words = [], None
        for _ in range(ANEW):
            if words is None:
                path = self.checkpoint
                words = self.words if path is None else [*self.words, "--ckpt_path", str(path)]
            before = runs.contents(self.folder)
            ending = runs.run(words, self.folder, disturb)
            if ending.status == 0:
                return refused
            if ending.sentence is None:
                raise Wrong(f"status {ending.status}: {ending.errors[-1500:]}")
            if runs.contents(self.folder) != before:
                raise Wrong(f"refused after files were changed: {ending.sentence}")
            refused.append(ending.sentence)
            words = self._repair(ending.sentence)
        raise Wrong(f"does not go on: {refused}")

    def _repair(self, sentence):
        """Do what a refusal says: take the checkpoint before, or begin anew."""
        previous = self.run_folder / "checkpoints" / "previous.ckpt"
        return [*self.words, "--ckpt_path", str(previous)] if previous.name in sentence else self.words

    def compare(self):
        """Raise unless the run is what it would have been."""
        difference = runs.Recorded.of(self.run_folder).difference(self.reference)
        if difference is not None:
            raise Wrong(f"another {difference} in {self.run_folder}")


def happen(kind, case):
    """Let a fault of a kind happen, and the run be taken up; return how that ended."""
    chance = case.chance
    if kind in ("full disk", "full for good", *ERRORS):
        number = ERRORS.get(kind, errno.ENOSPC)
        struck = []

        def fail(operation, size):
            struck.append(operation)
            raise OSError(number, os.strerror(number), str(operation.path))

        start = chance.randrange(len(case.operations))
        stop = len(case.operations) * 2 if kind == "full for good" else start + 1
        disturb = partial(fail_between, start, stop, fail)
        ending = runs.run(case.words, case.folder, disturb)
        if ending.status and ending.sentence is None:
            raise Wrong(f"status {ending.status}: {ending.errors[-1500:]}")
    elif kind in ("SIGTERM", "SIGINT"):
        number = getattr(signal, kind)
        ending = case.strike(lambda operation, size: os.kill(os.getpid(), number))
        if ending.status == 0 or "Traceback" in ending.errors:
            done = case.checkpoint is not None and not case.go_on()
            if "Traceback" in ending.errors or not done:
                raise Wrong(f"status {ending.status}: {ending.errors[-1500:]}")
    elif kind == "torn file":

        def tear(operation, size):
            if operation.done and operation.path.is_file():
                grown = operation.path.stat().st_size
                os.truncate(operation.path, chance.randint(min(size or 0, grown), grown))
            os.kill(os.getpid(), signal.SIGKILL)

        case.strike(tear)
    elif kind in ("flipped finished checkpoint", "finished, taken up again"):
        assert runs.run(case.words, case.folder).status == 0
    else:
        case.kill()
    if kind == "kill twice" and case.checkpoint is not None:
        words = [*case.words, "--ckpt_path", str(case.checkpoint)]
        case.strike(lambda operation, size: os.kill(os.getpid(), signal.SIGKILL), words)
    if case.checkpoint is not None:
        damage(kind, case)
    refused = [*second(kind, case), *case.go_on(clock(kind, chance))]
    case.compare()
    return "went on" if not refused else "refused, then went on"


def fail_between(start, stop, fail):
    for number in range(start, stop):
        runs.at_operation(number, fail)


def damage(kind, case):
    """Change what a killed run left."""
    if kind.startswith("flipped"):
        runs.flip_bit(case.checkpoint, case.chance)
    elif kind == "cut checkpoint":
        runs.cut(case.checkpoint, case.chance)
    elif kind == "cut table":
        runs.cut(case.run_folder / "readings.csv", case.chance)
    elif kind == "stale checkpoint":
        previous = case.checkpoint.with_name("previous.ckpt")
        if previous.is_file() and not previous.samefile(case.checkpoint):
            shutil.copy(previous, case.checkpoint)


def clock(kind, chance):
    """Set the clock of the process that goes on."""
    sign = {"clock back": -1, "clock forward": 1}.get(kind)
    return None if sign is None else runs.with_clock(sign * chance.choice([1, 60, 3600, 10**7]))


def second(kind, case):
    """Let two processes go on at once: one of them is refused."""
    if kind != "two at once" or case.checkpoint is None:
        return []
    words = [*case.words, "--ckpt_path", str(case.checkpoint)]
    pids = [runs.launch(words, case.folder) for _ in range(2)]
    endings = [runs.end_of(pid, case.folder) for pid in pids]
    refused = [ending for ending in endings if ending.status]
    if any(ending.sentence is None for ending in refused) or len(refused) == 2:
        raise Wrong(f"two at once: {endings}")
    return [ending.sentence for ending in refused]


def prepare(work):
    """Run undisturbed: what is to come out, and the operations on the way."""
    found = {}
    for stop in runs.STOPS:
        folder = work / f"undisturbed_{stop}"
        folder.mkdir()
        case = Case(folder, stop, None, [], None)
        ending = runs.run(case.words, folder, runs.recording(folder / "operations"))
        assert ending.status == 0, ending.errors
        operations = [tuple(line.split("\t")) for line in (folder / "operations").read_text().splitlines()]
        found[stop] = runs.Recorded.of(case.run_folder), operations
    return found


def main(words=None):
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the faults")
    parser.add_argument("--keep", type=Path, help="where to keep the folders of what went wrong")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepared = prepare(work)
        share = partial(let_happen, given, prepared, work)
        workers = [fork(partial(share, job), work / f"endings_{job}") for job in range(given.jobs)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]
        lines = [line for job in range(given.jobs) for line in (work / f"endings_{job}").read_text().splitlines()]
    assert not any(statuses), "a worker ended early"
    assert len(lines) == given.count
    results = [json.loads(line) for line in lines]
    counts = collections.Counter((result["kind"], result["end"]) for result in results)
    width = max(map(len, given.kinds))
    for kind in given.kinds:
        ends = {end: count for (other, end), count in sorted(counts.items()) if other == kind}
        print(f"{kind:{width}}  " + ", ".join(f"{count} {end}" for end, count in ends.items()))
    wrong = [result for result in results if result["end"] == "WRONG"]
    for result in wrong:
        print(f"WRONG, fault {result['number']}, {result['kind']}, stop at {result['stop']}: {result['why']}")
    print(f"{len(results)} faults, {len(wrong)} wrong")
    sys.exit(bool(wrong))


def fork(task, path):
    pid = os.fork()
    if not pid:
        status = 1
        try:
            with path.open("w") as file:
                task(file)
            status = 0
        finally:
            os._exit(status)
    return pid


def let_happen(given, prepared, work, job, file):
    """Let every jobs-th fault happen."""
    for number in range(job, given.count, given.jobs):
        chance = runs.chances(given.seed, number)
        kind, stop = given.kinds[number % len(given.kinds)], chance.choice(list(runs.STOPS))
        folder = work / f"fault_{number}"
        folder.mkdir()
        reference, operations = prepared[stop]
        why = None
        try:
            end = happen(kind, Case(folder, stop, reference, operations, chance))
        except Exception as error:
            end, why = "WRONG", f"{type(error).__name__}: {error}"
            if given.keep is not None:
                shutil.copytree(folder, given.keep / folder.name, dirs_exist_ok=True)
        result = {"number": number, "kind": kind, "stop": stop, "end": end, "why": why}
        file.write(json.dumps(result) + "\n")
        file.flush()
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
