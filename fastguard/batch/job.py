"""A batch job from its requests to its report: refuse what is wrong, resume, run, commit, summarize."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastguard.batch.claim import FORMAT, check, check_free, claim, differences
from fastguard.batch.conveyor import Failed
from fastguard.batch.manifest import Manifest
from fastguard.batch.names import clashes, ignores_case
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import Picture, read_record
from fastguard.batch.planning import Batch, plan
from fastguard.batch.prompt_files import BadRows, Source
from fastguard.batch.request import Request, remade
from fastguard.batch.sheet import MOST, write_sheet
from fastguard.batch.signals import Interrupted, interrupting
from fastguard.batch.store import Directory, Made, Shards
from fastguard.batch.summary import Summary, summarize
from fastguard.batch.tables import Problem
from fastguard.files import finite, short, write_atomic

__all__ = ["Interrupted", "Job", "Runner"]

REJECTED = "rejected.jsonl"
Prepare = Callable[[Made], Made]


class Runner(Protocol):
    """What makes the images: this process (`local`) or Ray's actors (`ray_runner`)."""

    phase: str  # what the first image waits for

    def start(self) -> None: ...  # loads; ValueError, OSError if it cannot run
    def run(self, batches: Sequence[Batch], prepare: Prepare) -> Generator[list[Made | Failed], None, None]: ...
    def stop(self) -> None: ...  # from a signal handler
    def close(self) -> None: ...


class Job:
    """The images of `requests` in the directory `out`.

    problems   rows that were left out already (keep_going)
    settings   of the model: with a request they decide what an image looks like
    source     what errors call the prompts

    `refuse` raises for all that can be known to be wrong, and writes nothing.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        problems: Sequence[Problem],
        out: Path,
        *,
        settings: dict[str, Any],
        source: Source,
        options: JobOptions,
    ) -> None:
        self.requests, self.problems, self.out = list(requests), list(problems), out
        self.settings, self.source, self.options = settings, source, options
        self._all_settings = {
            FORMAT: 2, **settings, "format": options.format, "metadata": options.metadata, "shard_size": options.shard_size,
        }  # fmt: skip
        self.manifest = Manifest(out)
        picture = Picture.of(options)
        self.store: Directory | Shards = (
            Directory(out, picture) if options.shard_size is None else Shards(out, picture, options.shard_size)
        )

    def refuse(self) -> None:
        """ValueError or OSError if the job cannot be done in `out`, or another process works there. Writes nothing."""
        check(self.out, self._all_settings)
        check_free(self.out)
        self.leave_out(self._bad_names())
        self.requests += self._remakes()
        self._done()

    def leave_out(self, found: Sequence[Problem]) -> None:
        """BadRows for requests (`values["id"]`) that cannot be made; keeping going they are left out and reported."""
        if found and not (self.options.keep_going and len(found) < len(self.requests)):
            raise BadRows(self.source, list(found))
        bad = {problem.values["id"] for problem in found}
        self.requests = [request for request in self.requests if request.id not in bad]
        self.problems += found

    def missing(self) -> bool:
        """Whether an image is still to be made, as far as that is known before the directory is opened."""
        return len(self._done()) < len(self.requests)

    def _remakes(self) -> list[Request]:
        """Images that are still to be asked for, in the place of those that the manifest calls suspect by now."""
        if not self.options.remake:
            return []
        suspect = {line["id"]: line.get("suspect") for line in self.manifest.lines()}
        known = {request.id for request in self.requests}
        made = [remade(r) for r in self.requests if r.remake_of is None and suspect.get(r.id)]
        return [request for request in made if request.id not in known]

    def _bad_names(self) -> list[Problem]:
        ids = {request.id for request in self.requests} if self.options.remake else set()
        if taken := [r for r in self.requests if remade(r).id in ids]:
            return [Problem.of(r, f"id={r.id!r}: {remade(r).id!r} must be left to its remake") for r in taken]
        if isinstance(self.store, Shards):
            dotted = [r for r in self.requests if "." in r.id]
            return [Problem.of(r, f"id={r.id!r}: must have no '.' in a WebDataset shard") for r in dotted]
        if not ignores_case(self.out):
            return []
        # Files that no line speaks of yet are there, too, after a crash.
        files = [path.stem for path in self.out.glob(f"*{self.store.picture.ending}")]
        return clashes(self.requests, [*self.manifest.index(), *files])

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
        there = {key: line.get(key) for key in own} | {"policy": json.loads(line.get("policy_json") or "null")}
        if line.get("screen"):  # then the line's policy is what came of it
            own, there = (
                own | {"policy": None},
                there | {"policy": None, "screen": [line["screen"]["noises"], line["screen"]["bound"]]},
            )
        what = "; ".join(differences(there, own))
        what = what or "another negative_prompt, guidance_scale, width or height"
        return Problem.of(request, f"id={request.id!r}: was made in {self.out} from other values: {what}")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Make `out` ours: only from here on something is written."""
        with ExitStack() as stack:
            stack.enter_context(claim(self.out, self._all_settings))
            self.manifest.open()
            stack.callback(self.manifest.close)
            self.store.open(self.manifest.lines())
            yield

    def run(self, start: Callable[[], Runner], *, progress: bool = True) -> Summary:
        """Make what is missing; inside `open`. start: called for the runner, started, once something is.

        `Interrupted` after SIGTERM or SIGINT, OSError if the disk is full, or the error of an image: all that was finished by then is
        in the manifest.
        """
        from tqdm import tqdm

        done = self._done() | self._adopt()
        before = len(done)
        self.requests += self._remakes()  # of what was found
        self._reject()
        if len(done) < len(self.requests):
            runner = start()
            with tqdm(
                total=len(self.requests), initial=before, unit="image", desc=runner.phase, disable=not progress
            ) as bar:
                self._make(runner, self.requests, done, bar)
                if again := self._remakes():
                    self.requests += again
                    bar.total += len(again)
                    self._make(runner, again, done, bar)
        self.store.close()
        made = len(done) - before
        if self.options.sheet:
            write_sheet(self.out, self._lines(), self.store.read)
        return summarize(self.out, self.requests, self.manifest, self._all_settings, made=made, problems=self.problems)

    def _lines(self) -> Iterator[dict[str, Any]]:
        """The manifest's last line of each image, in the order of the requests."""
        wanted = {request.id for request in self.requests[:MOST]}
        lines = {line["id"]: line for line in self.manifest.lines() if line["id"] in wanted}
        return (lines[request.id] for request in self.requests[:MOST] if request.id in lines)

    def _make(self, runner: Runner, requests: Sequence[Request], done: set[str], bar: Any) -> None:
        """Make what is not in `done`; whatever gets into the manifest gets into `done` too."""
        batches = plan(requests, self.options.batch_size, lambda request: request.id in done)
        with interrupting(runner.stop), closing(runner.run(batches, self.store.prepare)) as results:
            for group in results:
                bar.set_description_str("", refresh=False)
                fresh = [item for item in group if isinstance(item, Made) and item.request.id not in done]
                if fresh:
                    self.manifest.append(self.store.commit(fresh))
                    done.update(item.request.id for item in fresh)
                    bar.update(len(fresh))
                failed = [Problem.of(item.request, item.message) for item in group if isinstance(item, Failed)]
                self.problems += failed
                if failed:
                    self._reject()

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


def _rejection(problem: Problem) -> str:
    """A line of rejected.jsonl. What the row held may be no JSON, or nested too deeply for it: then it is shortened."""
    line = {"line": problem.line, "error": problem.message}
    try:
        return json.dumps(line | {"row": finite(problem.values)}, default=repr)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(line | {"row": short(problem.values)})
