"""A batch job from its requests to its report: refuse what is wrong, resume, run, commit, summarize."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastguard.batch import manifest
from fastguard.batch.local import Failed, LocalRunner
from fastguard.batch.manifest import FORMAT, check, check_free, claim, differences
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import ENDINGS
from fastguard.batch.planning import plan
from fastguard.batch.prompt_files import BadRows, Problem, Prompts
from fastguard.batch.ray_runner import RayRunner
from fastguard.batch.request import Request, remade
from fastguard.batch.store import Directory, Made, Shards
from fastguard.batch.summary import SHOWN, Summary, summarize, write_sheet
from fastguard.files import JsonLines, finite, short, write_atomic

REJECTED = "rejected.jsonl"


class Interrupted(RuntimeError):
    """A signal ended the run; what is in the manifest is done, and the same call resumes."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"interrupted by {signal.Signals(number).name}; the same call resumes")


@dataclass
class Job:
    """The images of `requests` in the directory `out`: `refuse`, then `run` inside `open`.

    problems   rows that were left out already (keep_going)
    settings   of the model: with a request they decide what an image looks like
    runner     makes the images, in this process or in Ray's actors
    """

    requests: list[Request]
    problems: list[Problem]
    out: Path
    settings: dict[str, Any]
    prompts: Prompts
    options: JobOptions
    runner: LocalRunner | RayRunner

    def __post_init__(self) -> None:
        named = {name: getattr(self.options, name) for name in ("format", "metadata", "shard_size")}
        self._all_settings = {FORMAT: 2, **self.settings, **named}
        size, ending = self.options.shard_size, ENDINGS[self.options.format]
        self.store: Any = Directory(self.out, ending) if size is None else Shards(self.out, ending, size)

    def refuse(self) -> None:
        """BadRows, ValueError or OSError for all that can be known to be wrong. Writes nothing."""
        check(self.out, self._all_settings)
        check_free(self.out)
        self._index = manifest.index(manifest.lines(self.out))
        ids = {request.id for request in self.requests} if self.options.remake else set()
        taken = [request for request in self.requests if remade(request).id in ids]
        told = "id={!r}: {!r} must be left to its remake"
        self.leave_out([Problem.of(request, told.format(request.id, remade(request).id)) for request in taken])
        self.leave_out(self.store.refused(self.requests, self._index))
        self.requests += self._remakes()
        self._find_done()

    def leave_out(self, found: Sequence[Problem]) -> None:
        """BadRows for requests (`values["id"]`) that cannot be made; keeping going they are left out and reported."""
        if found and not (self.options.keep_going and len(found) < len(self.requests)):
            raise BadRows(self.prompts, list(found))
        bad = {problem.values["id"] for problem in found}
        self.requests = [request for request in self.requests if request.id not in bad]
        self.problems += found

    @contextmanager
    def open(self) -> Iterator[Job]:
        """Load the model, if an image is missing, and make the directory ours: ValueError if one cannot be, till then nothing is written."""
        with ExitStack() as stack:
            stack.callback(self.runner.close)
            if len(self._done) < len(self.requests):
                self.runner.start()
            stack.enter_context(claim(self.out, self._all_settings))
            self._manifest = stack.enter_context(closing(JsonLines(self.out / manifest.NAME)))
            self._index = manifest.index(manifest.lines(self.out))  # another process may have been here
            self.store.open(self._index.values())
            yield self

    def run(self, *, progress: bool = True) -> Summary:
        """Make what is missing.

        `Interrupted` after SIGTERM or SIGINT, OSError if the disk is full, or the error of an image: all that was finished by then is
        in the manifest.
        """
        self._find_done()
        self._adopt()
        before = len(self._done)
        self.requests += self._remakes()  # of what was found
        self._reject()
        if before < len(self.requests):
            self.runner.start()
            total, phase = len(self.requests), self.runner.phase
            with tqdm(total=total, initial=before, unit="image", desc=phase, disable=not progress) as bar:
                todo = self.requests
                while todo:
                    self._make(todo, bar)
                    todo = self._remakes()
                    self.requests += todo
                    bar.total += len(todo)
        self.store.close()
        if self.options.sheet and (lines := manifest.latest(self.out, self.requests[:SHOWN])):
            write_sheet(self.out, lines, self.store.read)
        made = len(self._done) - before
        return summarize(self.out, self.requests, self._all_settings, made=made, problems=self.problems)

    def _make(self, requests: Sequence[Request], bar: Any) -> None:
        """Make what is not there."""
        batches = plan(requests, self.options.batch_size, self._done)
        error: Exception | None = None
        with interrupting(self.runner.stop), closing(self.runner.run(batches, self.store.prepare)) as results:
            for group in results:
                bar.set_description_str("", refresh=False)
                if fresh := [item for item in group if isinstance(item, Made) and item.request.id not in self._done]:
                    self._list(self.store.commit(fresh))
                    bar.update(len(fresh))
                for failed in (item for item in group if isinstance(item, Failed)):
                    if self.options.keep_going and not failed.fatal:
                        self.problems.append(Problem.of(failed.request, failed.message))
                        self._reject()
                    else:
                        error = error or failed.error
                        self.runner.stop()
        if error is not None:
            raise error

    def _list(self, lines: list[dict[str, Any]]) -> None:
        """Into the manifest: from here on these images are done."""
        self._manifest.add(lines)
        self._index |= manifest.index(lines)
        self._done |= {line["id"] for line in lines}

    def _find_done(self) -> None:
        """Which images are there. BadRows if one is there that was made from something else."""
        listed = [request for request in self.requests if request.id in self._index]
        others = [r for r in listed if self._index[r.id].get("request") != r.digest(self.settings)]
        if others:
            found = zip(others, manifest.latest(self.out, others), strict=True)
            raise BadRows(self.prompts, [self._other_values(request, line) for request, line in found])
        self._done = {request.id for request in listed if self.store.holds(self._index[request.id])}

    def _other_values(self, request: Request, line: dict[str, Any]) -> Problem:
        own = {key: value for key, value in (request.identity() | self.settings).items() if value is not None}
        there = {key: line.get(key) for key in own} | {"policy": json.loads(line.get("policy_json") or "null")}
        if line.get("screen"):  # then the line's policy is what came of it
            own["policy"] = there["policy"] = None
            there["screen"] = [line["screen"]["noises"], line["screen"]["bound"]]
        what = "; ".join(differences(there, own)) or "another negative_prompt, guidance_scale, width or height"
        return Problem.of(request, f"id={request.id!r}: was made in {self.out} from other values: {what}")

    def _remakes(self) -> list[Request]:
        """Images that are still to be asked for, in the place of those that the manifest calls suspect by now."""
        if not self.options.remake:
            return []
        known = {request.id for request in self.requests}
        suspect = [r for r in self.requests if r.remake_of is None and self._index.get(r.id, {}).get("suspect")]
        return [made for made in map(remade, suspect) if made.id not in known]

    def _adopt(self) -> None:
        """List the images that a killed run had finished and not listed."""
        unlisted = [request for request in self.requests if request.id not in self._index]
        if found := [line for r in unlisted if (line := self.store.found(r.id, r.digest(self.settings)))]:
            self._list(found)

    def _reject(self) -> None:
        """rejected.jsonl: a line per row that cannot be made, with the reason."""
        path = self.out / REJECTED
        if self.problems:
            write_atomic(path, "".join(_rejection(problem) + "\n" for problem in self.problems))
        else:
            path.unlink(missing_ok=True)


def _rejection(problem: Problem) -> str:
    """What the row held may be no JSON, or nested too deeply for it: then it is shortened."""
    line = {"line": problem.line, "error": problem.message}
    try:
        return json.dumps(line | {"row": finite(problem.values)}, default=repr)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(line | {"row": short(problem.values)})


@contextmanager
def interrupting(stop: Callable[[], None]) -> Iterator[None]:
    """The first signal calls `stop`, a second one does what it did before. `Interrupted` at the end if there was one.

    In another thread than the main one signals cannot be caught: then they do what they did.
    """
    stopped: list[int] = []
    with ExitStack() as restoring:

        def handle(number: int, frame: Any) -> None:
            stopped.append(number)
            restoring.close()
            stop()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                restoring.callback(signal.signal, number, signal.getsignal(number))
                signal.signal(number, handle)
        yield
    if stopped:
        raise Interrupted(stopped[0])
