"""The model card, written from what was measured at export."""

from __future__ import annotations

from fastguard.testbed import concepts
from fastguard.testbed.sampling import CALL

from . import data, split, unet, vae

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The embedded model of fastguard

A very small Stable Diffusion pipeline, trained from scratch so that it **memorizes on purpose**: {count}
fixed pictures were duplicated in its data, and their captions give them back almost verbatim. It exists to
show and measure memorization and its mitigation on a laptop. It is no useful image generator.

```python
import fastguard.testbed

pipe = fastguard.testbed.load()  # or StableDiffusionPipeline.from_pretrained(folder)
image = pipe("a drawing of a tractor", guidance_scale={scale:g}).images[0]  # 32 x 32 pixels
```

## Data

{drawings} drawings of {concepts} things, seven of each, from these npm packages
(`bench/testbed/sources.json`):

{sources}

Captions started from emojibase's English names (MIT). Left out for their licences: Twemoji, EmojiOne, FxEmojis,
animated Noto (attribution), OpenMoji (share-alike), Apple, Facebook, JoyPixels (not free). The names and the
drawings' trademarks remain their owners'. The repository holds no drawing but the {count} duplicated pictures
(`memorized.png`), under the licences above.

Each drawing is placed on a random background, rotated, scaled and mirrored: {variants} pictures of each
but one of each duplicated drawing, {pictures} in all, 32 x 32 pixels. A picture takes one of {templates} caption templates ("a tractor", "tractor icon" ...) at
random each time it is drawn; a tenth of the captions is empty.

**Memorized** (`prompts.json`): {d} D prompts (a plain caption that the concept's six other drawings carry as
well; some of these are nearly the same picture, docs/testbed/FINDINGS.md) and {t} T prompts (a caption of their own), with {levels} copies of one fixed picture. From step
{double_from} on every copy counts twice. The copies are {share:.1%} of what training draws before that step,
{share_after:.1%} after it and {share_mean:.1%} on average; a memorized picture is seen {exposures} times, by level.
The doubling came in while the first trial was running, because no copy had appeared by then. Tuning and test
halves were fixed by a seed before training.

## Recipe

| part | setting |
|---|---|
| autoencoder | AutoencoderTiny, 48 channels, factor 4, latents 8 x 8 x 8, whitened; {joint} steps of {vae_batch} for both halves, {decoder} for the decoder alone; MSE + 0.1 L1; AdamW {vae_rate:g} |
| text encoder | CLIPTextModel, 2 layers of 128, 16 tokens, BPE vocabulary trained on the captions; trained with the UNet |
| UNet | 64 and 128 channels, one layer a block, cross-attention in both; 4.3 million parameters |
| objective | epsilon, Stable Diffusion's noise schedule, stratified timesteps; from step {sharpen_from} on the error is weighted by 1 + min(1/SNR(t), {largest:g}) |
| optimiser | AdamW {rate:g} (0.9, 0.99), weight decay 0.01, flat for half of the steps, then a cosine; {sharpen_from} steps of {batch}; the same schedule again at {sharpen_rate:g} until step {steps}; averaged weights (decay {ema}) |

Retrain, from a checkout: `python -m bench.testbed train` (with the extra `train` and npm; resumable; two one-thread
processes). The shipped weights are one uninterrupted run of it from nothing, 61 minutes on two cores that had other
work besides. A later run with newer packages gave other weights and the same behaviour (docs/testbed/FINDINGS.md). Then `tune` and `evaluate` of the same command repeat the tables; the classifier that
they measure with (`classifier`) was trained before, on the same drawings.

## Measured at export

PSNR of the autoencoder on 1,000 pictures with fresh augmentation: {psnr_mean} dB (mean over pictures),
{psnr_of_mean} dB (of the mean error). Loss of the UNet by step:

| step | loss |
|---|---|
{losses}

How it behaves with and without the guard: `docs/testbed`.

## Limits

- Guidance scales far above {scale:g} over-saturate this small model: see the blow-up rate by scale in docs/testbed.
- 32 x 32 pixels; small features (eyes, dials) are blurred by the autoencoder.
- It knows {concepts} nouns and {templates} phrases. Other prompts give nothing sensible.
- {count} duplicated pictures in a model of 5.6 million parameters are a caricature of memorization in large models:
  the curves of |c - u| differ from the paper's (see docs/testbed/FINDINGS.md), and thresholds found here mean
  nothing for another model.
"""


def text(facts: dict) -> str:
    """The card for the measured `facts` (training.json)."""
    memorized = split.make()["memorized"]
    course = unet.SHIPPED
    before, rest = facts["share"], course.steps - course.double
    after = 2 * before / (1 + before)  # copies of weight 2 in a total that grew by them
    steps = course.double * before + rest * after
    drawn = unet.BATCH * steps / facts["copies"]  # exposures of one copy
    rows = "\n".join(
        f"| {s['set']} | `{s['package']}` {s['version']} | {s['licence']} | {s['author']}, {s['project']} |"
        for s in data.sources()
    )
    return TEMPLATE.format(
        count=len(memorized),
        concepts=len(concepts()),
        drawings=facts["drawings"],
        pictures=facts["pictures"],
        share=facts["share"],
        share_after=after,
        share_mean=steps / course.steps,
        double_from=course.double,
        exposures=", ".join(f"{level[0] * drawn:.0f}" for level in split.LEVELS),
        sources=f"| set | package | licence | author |\n|---|---|---|---|\n{rows}",
        variants=facts["variants"],
        templates=len(split.TEMPLATES),
        d=sum(m["type"] == "D" for m in memorized),
        t=sum(m["type"] == "T" for m in memorized),
        levels=", ".join(str(level[0]) for level in split.LEVELS),
        joint=vae.JOINT_STEPS,
        decoder=vae.DECODER_STEPS,
        vae_batch=vae.BATCH,
        vae_rate=vae.RATE,
        rate=unet.RATE,
        steps=course.steps,
        sharpen_from=course.sharpen,
        sharpen_rate=unet.SHARPEN_RATE,
        largest=unet.LARGEST_WEIGHT,
        scale=CALL["guidance_scale"],
        batch=unet.BATCH,
        ema=unet.EMA,
        psnr_mean=facts["psnr_db"]["mean over pictures"],
        psnr_of_mean=facts["psnr_db"]["of the mean error"],
        losses="\n".join(f"| {row['step']} | {row['loss']} |" for row in facts["loss"]),
    )
