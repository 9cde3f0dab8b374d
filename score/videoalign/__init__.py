"""The VideoAlign reward: visual quality, motion quality and text alignment from a released VideoReward checkpoint.

    VQ, MQ, TA          read at three tokens; with `use_norm`, (raw - mean) / std with the checkpoint's own constants
    Overall             their sum, not their mean, as in the reference's `inference.py`
    VQ_raw ... Overall_raw   the same without normalisation

Needs transformers alone: the checkpoint, the base model's config.json and tokenizer, and the prompt template of a
VideoAlign checkout. The default mode computes in float32 with the rotary rounding the model was trained with, so that
the batch changes nothing; `bfloat16` is what the official code runs: half the size, and noise between batches (up to
0.2 on a tiny model). VQ and MQ do not depend on the prompt and are kept per video.
Scores have no absolute scale: compare them only at one sampling `fps` (the released 2 unless there is a reason).
"""

from score.videoalign.reward import VideoAlign

__all__ = ["VideoAlign"]
