"""The verbs of the command line, one module a family: ``add(verbs)`` declares words, ``set_defaults(call=...)`` names what is done."""
