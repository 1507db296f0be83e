"""The local engine: one process, one pipeline."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

from PIL import Image

from fastguard.batch.overlap import Engine, Failed
from fastguard.batch.pictures import Picture
from fastguard.batch.planning import Batch
from fastguard.batch.request import Request
from fastguard.batch.stages import Stages
from fastguard.batch.store import Made


class LocalRunner:
    """Makes images with `pipe` in this process. settings: of the model, for the records; workers: threads that encode and write."""

    def __init__(
        self,
        pipe: Any,
        *,
        settings: dict[str, Any],
        picture: Picture,
        workers: int | None = None,
        keep_going: bool = False,
    ) -> None:
        self.pipe, self.settings, self.picture = pipe, settings, picture
        self.workers, self.keep_going = workers, keep_going
        self._stages: Stages | None = None
        self._engine: Engine | None = None

    def start(self, requests: Sequence[Request]) -> None:
        self._stages = Stages(self.pipe, requests, self.settings)

    def run(
        self, batches: Sequence[Batch], prepare: Callable[[Made], Made]
    ) -> Generator[list[Made | Failed], None, None]:
        """The images of `batches` in groups; `prepare` is called in the pool, with each of them."""

        def finish(request: Request, image: Image.Image, record: dict[str, Any]) -> Made:
            return prepare(Made(request, record, self.picture.encode(image, record)))

        if self._stages is None:
            raise RuntimeError("the runner was not started")
        self._engine = Engine(self._stages, finish, workers=self.workers, keep_going=self.keep_going)
        yield from self._engine.run(batches)

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.stop()

    def close(self) -> None:
        if self._stages is not None:
            self._stages.close()
