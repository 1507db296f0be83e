"""Batch generation: prompt files in, images and a manifest out.

request       one image to make: the fields of a prompt file, checked
prompt_files  txt, csv, jsonl and parquet to requests, with the line of what is wrong
fitting       what a model allows a request to be
planning      requests to batches of one shape; what is left of them after a crash
stages        text encoding (text), denoising and decoding (decoding) of one batch by a guarded pipeline
engine        the stages overlapped in threads; memory: what to do when it is short
local         runs them in this process, ray_engine on the actors of a Ray cluster
pictures      PNG, JPEG and WebP bytes with the record of the image inside
store         a directory of images, or WebDataset shards; growing: files that only grow
manifest      the append-only list of what is done
claim         an output directory belongs to one job
job           all of it: refuse, resume, run, commit, summarize

`fastguard.batch.generate` is the front.
"""
