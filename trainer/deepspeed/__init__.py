"""The same steps through DeepSpeed's engine, and its stages of ZeRO."""

from trainer.deepspeed.engine import DeepSpeedEngine

__all__ = ["DeepSpeedEngine"]
