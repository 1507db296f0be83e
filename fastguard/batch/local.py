"""engine="local": one process, one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from fastguard.batch.conveyor import Conveyor, Failed
from fastguard.batch.maker import Maker
from fastguard.batch.options import JobOptions
from fastguard.batch.pictures import Picture
from fastguard.batch.planning import Batch
from fastguard.batch.store import Made


class LocalRunner:
    """Makes images in this process, with the pipeline that `load` gives. settings: of the model, for the records."""

    phase = ""

    def __init__(self, load: Callable[[], Any], *, settings: dict[str, Any], options: JobOptions) -> None:
        self.load, self.settings, self.options = load, settings, options
        self._maker: Maker | None = None
        self._conveyor: Conveyor | None = None

    def start(self) -> None:
        self._maker = Maker(self.load(), self.settings)

    def run(
        self, batches: Sequence[Batch], prepare: Callable[[Made], Made]
    ) -> Generator[list[Made | Failed], None, None]:
        """The images of `batches` in groups; `prepare` is called in the pool, with each of them."""
        picture = Picture.of(self.options)
        if self._maker is None:
            raise RuntimeError("the runner was not started")
        self._conveyor = Conveyor(
            self._maker,
            lambda request, image, record: prepare(Made(request, record, picture.encode(image, record))),
            workers=self.options.workers,
            keep_going=self.options.keep_going,
        )
        return self._conveyor.run(batches)

    def stop(self) -> None:
        if self._conveyor is not None:
            self._conveyor.stop()

    def close(self) -> None:
        if self._maker is not None:
            self._maker.close()
