"""The compressed leaf: its layout, packing, levels and words."""
