"""Batch generation: prompt files in, images and a manifest out.

    prompts -> requests (prompt_files, request) -> batches (planning) -> images (local, ray_runner) -> files (store) -> manifest

`task` checks a job, which `job` resumes, runs, commits and summarizes; `options` has all options of `generate`, once.
"""
