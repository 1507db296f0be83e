"""Batch generation: prompt files in, images and a manifest out.

options       all options of `generate`, once
request       one image to make: the fields of a prompt file, checked
tables        txt, csv, jsonl, parquet, lists and DataFrames to rows
prompt_files  rows to requests, with the line of what is wrong
screening     what a model has memorized: a statistic per prompt
fitting       what a model allows a request to be
planning      requests to batches of one shape; what is left of them after a crash
maker         a batch by one call of a guarded pipeline
conveyor      many batches, and their files beside them; what to do when memory is short
local         runs them in this process, ray_runner on the actors of a Ray cluster
cuts          what of a prompt no text encoder reads
pictures      PNG, JPEG and WebP bytes with the record of the image inside
sheet         contact sheet
store         a directory of images, or WebDataset shards; growing: files that only grow
manifest      the append-only list of what is done
claim         an output directory belongs to one job; names: ids that would be one file
signals       SIGTERM and SIGINT end a run in good order
job           all of it: refuse, resume, run, commit, summarize
task          `fastguard.generate`, and the job that it prepares
"""
