"""The same on Ray Data: batches mapped over a pool of actors, each with a model of its own. Only the driver writes.

An actor that dies is started anew and its task done again; an image that had already arrived is not taken twice. Images travel
encoded to the driver, so the machines need no file system in common.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from fastguard import checks
from fastguard.batch.conveyor import Conveyor, Failed, finished
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import Picture
from fastguard.batch.planning import Batch
from fastguard.batch.request import Request
from fastguard.batch.store import Made

TRIES = 4  # of a task whose actor dies, before it is taken for the cause
BATCHES_PER_TASK = 4  # so that an actor writes one while it makes the next


class Ledger:
    """An actor that outlives the workers: how often each task was begun. Ray itself would start a deadly one again for ever."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, task: str) -> int:
        self._begun[task] += 1
        return self._begun[task]


class Worker:
    """An actor: a pipeline and its conveyor. `load` makes the pipeline, there."""

    def __init__(
        self, load: Callable[[], Any], settings: dict[str, Any], picture: Picture, keep_going: bool, ledger: Any
    ) -> None:
        from fastguard.batch.maker import Maker

        self.failure: ValueError | None = None
        try:
            self.maker = Maker(load(), settings)
        except ValueError as error:  # an actor that raises here would be started again and again
            self.failure = error
        self.picture, self.keep_going, self.ledger = picture, keep_going, ledger

    def __call__(self, table: Any) -> Iterator[Any]:
        """A table of pickled batches to tables of pickled results, as they get ready. An error is a result too."""
        import pyarrow

        def packed(group: Iterable[Any]) -> Any:
            # One row: Ray Data makes a block of each, with a wait for the driver of about 0.1 s.
            return pyarrow.table({"group": pyarrow.array([pickle.dumps(list(group))], pyarrow.large_binary())})

        def finish(request: Request, image: Any, record: dict[str, Any]) -> Made:
            return Made(request, record, self.picture.encode(image, record))

        if self.failure is not None:
            yield packed([self.failure])
            return
        batches = [pickle.loads(data) for data in table.column("batch").to_pylist()]
        conveyor = Conveyor(self.maker, finish, workers=1, keep_going=self.keep_going)
        tries = _ray().get(self.ledger.begin.remote(batches[0][0].id))
        if tries > TRIES:
            message = f"actors died {TRIES} times over this and the other images of its task"
            failed = [Failed(request, message) for batch in batches for request in batch]
            error = RuntimeError(f"id={failed[0].request.id!r}: {message}")
            yield packed(failed if self.keep_going else [error])
            return
        try:
            for group in conveyor.run(batches):
                yield packed(group)
        except Exception as error:
            yield packed([RuntimeError(f"{type(error).__name__}: {error}")])


class RayRunner:
    """Makes images on the actors that `options` ask for, each with its CPUs and GPUs (fractions share one).

    load   makes the pipeline; called in the actors, so it must be picklable

    Without options.ray_address: on the cluster that this process is connected to, or else on a local one that ends with the job.
    """

    def __init__(self, load: Callable[[], Any], *, settings: dict[str, Any], options: JobOptions) -> None:
        _ray()
        self.load, self.settings, self.picture = load, settings, Picture.of(options)
        self.actors = options.actors or 1
        self.cpus = 1.0 if options.cpus_per_actor is None else options.cpus_per_actor
        self.gpus = options.gpus_per_actor or 0.0
        self.address, self.keep_going = options.ray_address, options.keep_going
        self.phase = f"starting {self.actors} actor{'s' * (self.actors != 1)}"
        self._owned = self._waiting = self._stopped = False

    def start(self) -> None:
        """Connect to the cluster, or start a local one. ConnectionError if there is none at the address, ValueError if it is too small."""
        self._connect()
        try:
            check_resources(_ray().nodes(), self.actors, self.cpus, self.gpus)
        except ValueError:
            self.close()
            raise

    def _connect(self) -> None:
        ray = _ray()
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if self.address is None:
            needed = int(-(-self.actors * self.cpus // 1)) + 1
            options |= {"address": "local", "include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, needed)}
        else:
            options["address"] = self.address
            _reach(self.address)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except Exception as error:
            if self.address is None:
                raise
            reason = str(error).partition("\n")[0]
            raise ConnectionError(f"ray_address={self.address!r}: {reason}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray puts its own, which exits
        self._owned = True

    def run(
        self, batches: Sequence[Batch], prepare: Callable[[Made], Made]
    ) -> Generator[list[Made | Failed], None, None]:
        with _quiet_context() as data, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            results = self._dataset(data, batches).iter_batches(batch_size=None, batch_format="pyarrow")
            iterator = iter(results)
            while (table := self._next(iterator)) is not None:
                items = [item for data in table.column("group").to_pylist() for item in pickle.loads(data)]
                errors: list[BaseException] = [item for item in items if isinstance(item, Exception)]
                futures = [
                    pool.submit(self._stored, item, prepare) for item in items if not isinstance(item, Exception)
                ]
                errors += [error for future in futures if (error := future.exception())]
                group = [future.result() for future in futures if not future.exception()]
                if group:
                    yield group
                if errors:
                    raise errors[0]

    def _stored(self, item: Made | Failed, prepare: Callable[[Made], Made]) -> Made | Failed:
        if isinstance(item, Failed):
            return item
        return finished(functools.partial(prepare, item), item.request, self.keep_going)

    def _dataset(self, data: Any, batches: Sequence[Batch]) -> Any:
        per_task = max(1, min(BATCHES_PER_TASK, len(batches) // (2 * self.actors)), len(batches) // 10_000)
        tasks = -(-len(batches) // per_task)
        items = data.from_items([{"batch": pickle.dumps(batch)} for batch in batches], override_num_blocks=tasks)
        return items.map_batches(
            Worker,
            fn_constructor_kwargs={
                "load": self.load,
                "settings": self.settings,
                "picture": self.picture,
                "keep_going": self.keep_going,
                "ledger": _ray().remote(Ledger).options(num_cpus=0).remote(),
            },
            batch_size=per_task,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(self.actors, tasks)),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )

    def _next(self, iterator: Iterator[Any]) -> Any:
        """The next table; None at the end, or once stopped."""
        try:
            self._waiting = True
            return None if self._stopped else next(iterator, None)
        except _Stop:
            return None
        finally:
            self._waiting = False

    def stop(self) -> None:
        """From a signal handler: end the wait for the actors, but never a write."""
        self._stopped = True
        if self._waiting:
            raise _Stop

    def close(self) -> None:
        if self._owned:
            _ray().shutdown()
            self._owned = False


class _Stop(BaseException):
    pass


def check_resources(nodes: Sequence[dict[str, Any]], actors: int, cpus: float, gpus: float) -> None:
    """ValueError if the machines of a cluster cannot hold the actors: Ray would wait for others for ever, without a word.

    nodes  as `ray.nodes()` lists them
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    held = sum(
        int(min((node.get(name, 0) / amount + 1e-9 for name, amount in wanted.items()), default=actors))
        for node in resources
    )
    if held >= actors:
        return
    there = " and ".join(f"{sum(node.get(name, 0) for node in resources):g} {name}s" for name in wanted)
    options = f"cpus_per_actor={cpus:g}, gpus_per_actor={gpus:g}"
    raise ValueError(
        f"actors={actors}, {options}: the cluster of {len(resources)} machine{'s' * (len(resources) != 1)} has {there},"
        f" enough for {held} of the actors"
    )


def _reach(address: str) -> None:
    """ConnectionError if nobody listens at HOST:PORT or ray://HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"ray_address={address!r}: no Ray cluster answers there: {error}") from None


def _ray() -> Any:
    ray = checks.extra("ray", "ray", "engine='ray'")
    checks.extra("ray.data", "ray", "engine='ray'")
    return ray


@contextmanager
def _quiet_context() -> Iterator[Any]:
    """ray.data without its own progress bars, and with groups that leave an actor one by one instead of by 128 MB."""
    data = _ray().data
    context = data.DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False, "target_max_block_size": 1}
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    level = logging.getLogger("ray.data").level
    try:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        for name in before:
            setattr(context, name, wanted[name])
        yield data
    finally:
        logging.getLogger("ray.data").setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
