"""What interpreters that tests start run first."""

# `import zinfer` brings torch and transformers, which take seconds to import. The I/O library and the pool need
# neither, the store only torch: here the package is found, and they in it, but what it offers itself is not imported.
LIBRARIES_ONLY = """
import importlib.util, sys
sys.modules["zinfer"] = importlib.util.module_from_spec(importlib.util.find_spec("zinfer"))
"""
