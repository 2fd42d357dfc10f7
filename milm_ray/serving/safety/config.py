"""The settings of the safety check, where the configuration keeps them."""

from milm_ray.serve_settings import (
    CATEGORIES,
    Category,
    HelpLine,
    SafetyConfig,
    default_help_lines,
)

__all__ = ["CATEGORIES", "Category", "HelpLine", "SafetyConfig", "default_help_lines"]
