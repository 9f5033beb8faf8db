"""The batch plan: samples in, the order in which they are computed and stored out.

A plan is a pure function of tokenised samples and frozen settings. Start at `windows.plan_windows`.
"""
