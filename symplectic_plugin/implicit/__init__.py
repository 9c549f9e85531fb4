"""Implicit Runge-Kutta methods for stiff systems, and the adjoints of their steps.

Read in this order: `tableaux` (the methods), `stage_field` (f at one stage, and its derivatives), `linear` (what solves
the linear systems), `newton` (the stages), `step` (a step forward, and its symplectic partner's step back).
"""
