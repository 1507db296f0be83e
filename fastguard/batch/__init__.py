"""Batch generation: prompt files in, images and a manifest out.

    prompts -> rows (tables) -> requests (prompt_files, request) -> batches (planning) -> images (local) -> files (store) -> manifest

options       all options of `generate`, once
task          `fastguard.generate`: checks a job and runs it
job           a job: refuse, resume, run, commit, summarize
local         the loop over batches in this process; ray_runner: the same in each actor of a Ray cluster
fitting       what a model allows a request to be
screening     what a model has memorized: a statistic per prompt
cuts          what of a prompt no text encoder reads
pictures      PNG, JPEG and WebP bytes with the record of the image inside
growing       files that only grow: the manifest, shards
signals       SIGTERM and SIGINT end a run in good order
summary       report.json, the summary, the contact sheet
"""
