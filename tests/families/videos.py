"""Tiny instances of video and audio pipelines."""

from __future__ import annotations

from tests.families.tiny import Tiny

VIDEOS: dict[str, Tiny] = {}
