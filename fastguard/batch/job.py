"""A batch job from its prompt file to its report: refuse what is wrong, resume, run, commit, summarize."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastguard import checks
from fastguard.batch.claim import check, check_free, claim, differences, ignores_case
from fastguard.batch.fitting import Limits
from fastguard.batch.manifest import Manifest
from fastguard.batch.overlap import Failed
from fastguard.batch.pictures import Picture, read_record
from fastguard.batch.planning import Batch, plan
from fastguard.batch.prompt_files import BadRows, Problem, Source
from fastguard.batch.request import Request
from fastguard.batch.store import Directory, Made, Shards
from fastguard.batch.summary import Summary, summarize
from fastguard.files import finite, short, write_atomic

REJECTED = "rejected.jsonl"


class Interrupted(RuntimeError):
    """A signal ended the run; what is in the manifest is done, and the same call resumes."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"interrupted by {signal.Signals(number).name}; the same call resumes")


Prepare = Callable[[Made], Made]


class Runner(Protocol):
    """What makes the images: the local engine or Ray."""

    def start(self, requests: Sequence[Request]) -> None: ...
    def run(self, batches: Sequence[Batch], prepare: Prepare) -> Generator[list[Made | Failed], None, None]: ...
    def stop(self) -> None: ...  # from a signal handler
    def close(self) -> None: ...


class Job:
    """The images of `requests` in the directory `out`.

    settings   of the model: with a request they decide what an image looks like
    source     what errors call the prompts
    problems   rows that were left out already (keep_going)
    shard_size images per WebDataset shard; None: a file per image

    `refuse` raises for all that can be known to be wrong, and writes nothing.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        out: Path,
        *,
        settings: dict[str, Any],
        source: Source,
        batch_size: int = 8,
        picture: Picture | None = None,
        shard_size: int | None = None,
        keep_going: bool = False,
        problems: Sequence[Problem] = (),
    ) -> None:
        self.requests, self.out, self.settings, self.source = list(requests), out, settings, source
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.picture, self.keep_going, self.problems = picture or Picture(), keep_going, list(problems)
        if shard_size is not None:
            checks.integer("shard_size", shard_size, 1)
            dotted = [
                Problem(r.line or 0, f"id={r.id!r}: must have no '.' in a WebDataset shard")
                for r in requests
                if "." in r.id
            ]
            if dotted:
                raise BadRows(source, dotted)
        elif ignores_case(out):
            folded: dict[str, Request] = {}
            same = [(r, folded.setdefault(r.id.casefold(), r)) for r in requests]
            twins = [
                Problem(r.line or 0, f"id={r.id!r}: is the same file as id={o.id!r} here")
                for r, o in same
                if r is not o
            ]
            if twins:
                raise BadRows(source, twins)
        self._all_settings = {
            "fastguard_generate": 1, **settings, "format": self.picture.format, "shard_size": shard_size,
        }  # fmt: skip
        self.manifest = Manifest(out)
        self.store: Directory | Shards = (
            Directory(out, self.picture) if shard_size is None else Shards(out, self.picture, shard_size)
        )
        self._stopped: int | None = None

    def refuse(self) -> None:
        """ValueError or OSError if the job cannot be done in `out`, or another process works there. Writes nothing."""
        check(self.out, self._all_settings)
        check_free(self.out)
        self._done()

    def _done(self) -> set[str]:
        """Ids of the images that are there. BadRows if one is there that was made from something else."""
        index, done = self.manifest.index(), set()
        others: dict[str, Request] = {}
        for request in self.requests:
            line = index.get(request.id)
            if line is None:
                continue
            if line.get("request") != request.digest(self.settings):
                others[request.id] = request
            elif self.store.holds(line):
                done.add(request.id)
        if others:
            latest = {line["id"]: line for line in self.manifest.lines() if line["id"] in others}
            raise BadRows(self.source, [self._other_values(others[id], line) for id, line in latest.items()])
        return done

    def _other_values(self, request: Request, line: dict[str, Any]) -> Problem:
        own = {key: value for key, value in (request.identity() | self.settings).items() if value is not None}
        what = "; ".join(differences({key: line.get(key) for key in own}, own))
        what = what or "another negative_prompt, guidance_scale, width or height"
        return Problem(request.line or 0, f"id={request.id!r}: was made in {self.out} from other values: {what}")

    def fit(self, limits: Limits) -> None:
        """BadRows if the model cannot make some of the images; keeping going, they are left out and reported."""
        found = limits.problems(self.requests)
        if found and not (self.keep_going and len(found) < len(self.requests)):
            raise BadRows(self.source, found)
        bad = {problem.values["id"] for problem in found}
        self.requests = [request for request in self.requests if request.id not in bad]
        self.problems += found

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make `out` ours: only from here on something is written."""
        with ExitStack() as stack:
            stack.enter_context(claim(self.out, self._all_settings))
            self.manifest.open()
            stack.callback(self.manifest.close)
            self.store.open(self.manifest.lines())
            yield

    def run(self, load: Callable[[], Runner], *, progress: bool = True) -> Summary:
        """Make what is missing; inside `open`. load: called for the runner once something is.

        `Interrupted` after SIGTERM or SIGINT, OSError if the disk is full, or the error of an image: all that was finished by then is
        in the manifest.
        """
        from tqdm import tqdm

        done = self._done() | self._adopt()
        before = len(done)
        self._reject()
        if len(done) < len(self.requests):
            runner = load()
            with tqdm(total=len(self.requests), initial=before, unit="image", disable=not progress) as bar:
                runner.start(self.requests)
                try:
                    self._make(runner, done, bar)
                finally:
                    runner.close()
        made = len(done) - before
        self.store.close()
        return summarize(
            self.out, self.requests, self.manifest, self._all_settings, made=made, rejected=len(self.problems)
        )

    def _make(self, runner: Runner, done: set[str], bar: Any) -> None:
        """Make what is not in `done`; whatever gets into the manifest gets into `done` too."""
        batches = plan(self.requests, self.batch_size, lambda request: request.id in done)
        with self._signals(runner), closing(runner.run(batches, self.store.prepare)) as results:
            for group in results:
                fresh = [item for item in group if isinstance(item, Made) and item.request.id not in done]
                if fresh:
                    self.manifest.append(self.store.commit(fresh))
                    done.update(item.request.id for item in fresh)
                    bar.update(len(fresh))
                failed = [item for item in group if isinstance(item, Failed)]
                for item in failed:
                    values = {"id": item.request.id, "prompt": item.request.prompt}
                    self.problems.append(Problem(item.request.line or 0, item.message, values))
                if failed:
                    self._reject()
        if self._stopped is not None:
            raise Interrupted(self._stopped)

    def _adopt(self) -> set[str]:
        """Images that a killed run had finished but not yet listed: they say themselves what they are. Returns their ids."""
        listed = self.manifest.index()
        lines = []
        for request in self.requests:
            path = self.store.path(request)
            if path is None or request.id in listed or not path.exists():
                continue
            record = read_record(path)
            if (
                record
                and (record.get("id"), record.get("request")) == (request.id, request.digest(self.settings))
                and "versions" in record
            ):
                lines.append(record | Directory.place(path, path.read_bytes()))
        if lines:
            self.manifest.append(lines)
        return {line["id"] for line in lines}

    def _reject(self) -> None:
        """rejected.jsonl: a line per row that cannot be made, with the reason."""
        path = self.out / REJECTED
        if not self.problems:
            path.unlink(missing_ok=True)
            return
        write_atomic(path, "".join(_rejection(problem) + "\n" for problem in self.problems))

    @contextmanager
    def _signals(self, runner: Runner) -> Iterator[None]:
        """SIGTERM and SIGINT end the run at the next step. A second one does what it did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}

        def handle(number: int, frame: Any) -> None:
            self._stopped = number
            for each, handler in before.items():
                signal.signal(each, handler)
            runner.stop()

        for number in numbers:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _rejection(problem: Problem) -> str:
    """A line of rejected.jsonl. What the row held may be no JSON, or nested too deeply for it: then it is shortened."""
    line = {"line": problem.line, "error": problem.message}
    try:
        return json.dumps(line | {"row": finite(problem.values)}, default=repr)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(line | {"row": short(problem.values)})
