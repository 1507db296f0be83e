"""`python -m bench scenario lora|full`: memorization as it lives in fine-tunes, twenty pictures with captions of their own.

drawings   the pictures and their captions
finetune   a LoRA (peft) or the whole UNet of the embedded model trained on them
items      the benchmark's prompts: the twenty captions, and ordinary ones
command    fine-tune, calibrate the gate on ordinary prompts as a user would, then everything that `bench paper` does
"""
