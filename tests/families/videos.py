"""Tiny instances of video and audio pipelines."""

from __future__ import annotations

from tests.families.tiny import Tiny
from tests.families.videos_audio import AUDIO
from tests.families.videos_dit import DIT
from tests.families.videos_flow import FLOW
from tests.families.videos_motion import MOTION

VIDEOS: dict[str, Tiny] = {**MOTION, **DIT, **FLOW, **AUDIO}
