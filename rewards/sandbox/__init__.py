"""Runs a stranger's Python program where it can read nothing of ours, change nothing and outlive nothing.

    worker -- root drops to a uid of its own --> bwrap: namespaces, seccomp --> inside.py: rlimits, then the program
      |  requests: marshal, our own values                                         |
      +<-- replies: one bounded line each, text that is never executed ------------+

A fresh sandbox per completion: no program meets what another one left. See docs/rewards.md for what this does not stop.
"""
