"""Fine-tune chat models with LoRA and QLoRA from notebooks that explain every step."""
__version__ = "0.1.0"
