"""Parts of benchmarks/calibration.py: problems, recipes, the choices that are varied, measures, table and figure."""
