"""Warm sets: the checkpoints that an operator's file says this node keeps warm.

    file --parse--> wishes --reconcile--> a keeper for each --prefetch--> entries of the staging buffer

`warm_set` watches the file and has the keepers, `wishes` parses the file, `keeper` keeps one checkpoint warm,
`standing` is what status and log say of it, `shared` is what keepers have in common, `survey` says what one
needs, `warm_up` stages one, `disk` gets one to the tier, `features` tells node-feature-discovery what is
warm, `check` is `penstock warm-set check`.

May import: what `loads` may, and `loads` itself.
"""
