"""Memories mixed inside the layers, too: does a gate behind chosen layers earn its keep on the target, or on what is retained?"""
