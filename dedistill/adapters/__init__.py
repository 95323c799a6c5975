"""Adapters: which linears, what form, how they start, what they add up to, and their files.

LyCORIS provides the modules and the names in files; targets, initialisation, the delta and the merge are ours.
"""
