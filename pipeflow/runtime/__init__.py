"""How a program runs: one executor, two transports, and the one-device oracle.

Knows torch. Decides nothing: what runs where and when is in the program it is given.
"""
