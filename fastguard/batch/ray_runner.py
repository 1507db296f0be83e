"""The same on Ray Data: batches mapped over a pool of actors, each with a local runner. Only the driver writes.

An actor that dies is started anew and its task done again; an image that had already arrived is not taken twice. Images travel
encoded to the driver, so the machines need no file system in common.
"""

import logging
import math
import os
import pickle
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from fastguard import checks
from fastguard.batch.local import Failed, LocalRunner, Prepare, Result, attempt
from fastguard.batch.options import JobOptions
from fastguard.batch.planning import Batch

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
    """An actor: a local runner, whose model is loaded there."""

    def __init__(self, load: Callable[[], Any], settings: dict[str, Any], options: JobOptions, ledger: Any) -> None:
        self.runner, self.ledger = LocalRunner(load, settings, options), ledger
        self.failure: ValueError | None = None
        try:
            self.runner.start()
        except ValueError as error:  # an actor that raises here would be started again and again
            self.failure = error

    def __call__(self, table: Any) -> Iterator[Any]:
        """A table of pickled batches to tables of pickled results, as they get ready."""
        import pyarrow

        for group in self._groups([pickle.loads(data) for data in table.column("batch").to_pylist()]):
            # One row: Ray Data makes a block of each, with a wait for the driver of about 0.1 s.
            yield pyarrow.table({"group": pyarrow.array([pickle.dumps(group)], pyarrow.large_binary())})

    def _groups(self, batches: Sequence[Batch]) -> Iterator[list[Result]]:
        first = batches[0][0]
        if self.failure is not None:
            yield [Failed(first, self.failure, str(self.failure), fatal=True)]
        elif _ray().get(self.ledger.begin.remote(first.id)) > TRIES:
            told = f"id={first.id!r}: actors died {TRIES} times over this and the other images of its task"
            yield [Failed.of(request, RuntimeError(told)) for request in chain.from_iterable(batches)]
        else:
            for group in self.runner.run(batches, lambda made: made):
                # Not every error can be pickled.
                yield [replace(x, error=RuntimeError(x.message)) if isinstance(x, Failed) else x for x in group]


class _Stop(BaseException):
    pass


class RayRunner:
    """Makes images on the actors that `options` ask for, each with its CPUs and GPUs (fractions share one).

    load   makes the pipeline; called in the actors, so it must be picklable

    Without options.ray_address: on the cluster that this process is connected to, or else on a local one that ends with the job.
    """

    def __init__(self, load: Callable[[], Any], settings: dict[str, Any], options: JobOptions) -> None:
        _ray()
        self.load, self.settings, self.options = load, settings, options
        self.actors, self.gpus = options.actors or 1, options.gpus_per_actor or 0.0
        self.cpus = 1.0 if options.cpus_per_actor is None else options.cpus_per_actor
        self.phase = f"starting {self.actors} actor{'s' * (self.actors != 1)}"
        self._ending = ExitStack()
        self._waiting = self._stopped = False

    def start(self) -> None:
        """Connect to the cluster, or start a local one. ConnectionError if there is none at the address, ValueError if it is too small."""
        ray, address = _ray(), self.options.ray_address
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            own: dict[str, Any] = {"address": address}
            if address is None:
                needed = math.ceil(self.actors * self.cpus) + 1  # one for Ray Data
                own = {"address": "local", "include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, needed)}
            else:
                _reach(address)
            handler = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(logging_level=logging.WARNING, log_to_driver=False, **own)
            except Exception as error:
                raise ConnectionError(f"ray_address={address!r}: {str(error).partition(chr(10))[0]}") from error
            finally:
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)  # Ray puts its own, which exits
            self._ending.callback(ray.shutdown)
        check_resources(ray.nodes(), self.actors, self.cpus, self.gpus)

    def run(self, batches: Sequence[Batch], prepare: Prepare) -> Generator[list[Result], None, None]:
        with _quiet_context() as data, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            tables = iter(self._dataset(data, batches).iter_batches(batch_size=None, batch_format="pyarrow"))
            while (table := self._next(tables)) is not None:
                groups = [pickle.loads(data) for data in table.column("group").to_pylist()]
                yield list(pool.map(partial(attempt, prepare), chain.from_iterable(groups)))

    def _dataset(self, data: Any, batches: Sequence[Batch]) -> Any:
        per_task = max(1, min(BATCHES_PER_TASK, len(batches) // (2 * self.actors)), len(batches) // 10_000)
        tasks = -(-len(batches) // per_task)
        ledger = _ray().remote(Ledger).options(num_cpus=0).remote()
        items = data.from_items([{"batch": pickle.dumps(batch)} for batch in batches], override_num_blocks=tasks)
        return items.map_batches(
            Worker,
            fn_constructor_args=(self.load, self.settings, self.options, ledger),
            batch_size=per_task,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(size=min(self.actors, tasks)),
            num_cpus=self.cpus,
            num_gpus=self.gpus or None,
        )

    def _next(self, tables: Iterator[Any]) -> Any:
        """The next table; None at the end, or once stopped."""
        try:
            self._waiting = True
            return None if self._stopped else next(tables, None)
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
        self._ending.close()


def check_resources(nodes: Sequence[dict[str, Any]], actors: int, cpus: float, gpus: float) -> None:
    """ValueError if the machines (as `ray.nodes()` lists them) cannot hold the actors: Ray would wait for others for ever, without a word."""
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    fitting = [[there.get(name, 0) / amount + 1e-9 for name, amount in wanted.items()] for there in machines]
    held = sum(int(min(shares, default=actors)) for shares in fitting)
    if held < actors:
        have = " and ".join(f"{sum(there.get(name, 0) for there in machines):g} {name}s" for name in wanted)
        raise ValueError(
            f"actors={actors}, cpus_per_actor={cpus:g}, gpus_per_actor={gpus:g}: the cluster of {len(machines)}"
            f" machine{'s' * (len(machines) != 1)} has {have}, enough for {held} of the actors"
        )


def _reach(address: str) -> None:
    """ConnectionError if nobody listens at HOST:PORT or ray://HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"ray_address={address!r}: no Ray cluster answers there: {error}") from None


def _ray() -> Any:
    checks.extra("ray.data", "ray", "engine='ray'")
    return checks.extra("ray", "ray", "engine='ray'")


@contextmanager
def _quiet_context() -> Iterator[Any]:
    """ray.data without its own progress bars, and with groups that leave an actor one by one instead of by 128 MB."""
    data, log = _ray().data, logging.getLogger("ray.data")
    context = data.DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False, "target_max_block_size": 1}
    with ExitStack() as restoring:
        restoring.callback(log.setLevel, log.level)
        log.setLevel(logging.ERROR)
        for name in wanted.keys() & dir(context):
            restoring.callback(setattr, context, name, getattr(context, name))
            setattr(context, name, wanted[name])
        yield data
