"""An adapter that learns from the traffic it serves: what requests leave behind, who learns from it, who takes it.

Nothing here can change a text: in `match` the tokens are the base model's, whatever its adapter drafts.
"""
