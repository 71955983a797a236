"""The explorer: pages over a feature store, served by Streamlit on this machine.

    launch      starts the server for one store
    serve       the process of the server
    access      the names that the server answers to, the token, read-only
    guard       the gate in front of the server
    offline     what keeps its processes from connecting to other machines
    lifeline    what ends a process with the one that started it
    main        the script that the server runs for every page
    url         how parameters are declared, read from a URL and written to it
    view        the parameters that all pages share: which features, in which order, how examples are shown
    session     the open store and the generation that a session shows
    runs        the run that an SAE came from, its model, and whose turn it is to use it
    answers     what the model and the SAE compute for a text, kept for a while
    described   the names of features
    work        jobs: long work in processes beside the server (check, match, map, explain)
    worker      what such a process runs; it sends events, which work reads
    page        one module or package per page, with the helpers that only it uses (a folder called "pages"
                would make Streamlit serve its files itself)
    components  the parts that several pages are made of; static/ has their scripts and style sheets

A page is a module with PATH, TITLE, SECTION and ``show(here)``, listed in main; parameters of its own are a
`url.Query`. Nothing here runs SQL of its own or leaves the machine, and pages that run no model need none.
Text from a store (tokens, labels, names) may be hostile: it reaches the page only through the components of
``static/``, as text nodes.
"""
