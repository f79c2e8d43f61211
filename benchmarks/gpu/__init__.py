"""The phases of benchmarks/on_gpu.sh: driver.py runs them, and a module each has their cases."""
