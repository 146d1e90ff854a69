"""The official F2D2 recipe, to compare with: module and likelihood query, configuration, and plain training step."""
