"""The geometry of every published Qwen2.5-VL: patches of pixels, placeholders of patches."""

PATCH_SIZE = 14
"""Pixels on each side of a patch."""

TEMPORAL_PATCH_SIZE = 2
"""Frames in a patch; an image is repeated to fill them."""

SPATIAL_MERGE_SIZE = 2
"""Patches on each side of a placeholder."""

PATCHES_PER_PLACEHOLDER = SPATIAL_MERGE_SIZE**2

PLACEHOLDER_SIDE = SPATIAL_MERGE_SIZE * PATCH_SIZE
"""Pixels on each side of a placeholder."""

PLACEHOLDER_PIXELS = PLACEHOLDER_SIDE**2
"""Pixels of an image that one placeholder stands for."""
