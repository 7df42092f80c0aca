"""The export stage: a trained network in, a deployable file out, and the proof of what that file does.

lowering/ holds one graph pass a file; formats.py says which format is made of which passes; session.py runs a file in
onnxruntime and reads its optimised graph; parity.py and recheck.py judge; bundle.py is the folder that leaves the
house.
"""
