"""moepad inside serving frameworks: one module each, imported by the framework's own plugin loader.

Nothing else of moepad imports these, and they import their framework.
"""
