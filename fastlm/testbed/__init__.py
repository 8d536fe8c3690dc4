"""The kernel author's bench: check, compile, explain and time any kernel of the registry, on any machine.

    fastlm kernels list | check | compile | explain | bench | new

One file a command, each with a `run(options) -> exit status`; `options.py` holds what each may be told.
"""
