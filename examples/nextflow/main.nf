// Segment a plate in parts with Nextflow.  Each part runs as a task of its own; `-resume` continues.
//
//     nextflow run examples/nextflow/main.nf --images plate --out results --parts 8
//
// The folder `out` must be one that all tasks share.  `options` are those of `dinocell segment`.

params.images = null
params.out = 'results'
params.parts = 8
params.options = ''

process DINOCELL_PLAN {
    label 'process_single'

    input:
    val images
    val out

    output:
    env('COUNT')

    script:
    """
    dinocell shards plan ${params.parts} ${images} --out ${out} ${params.options}
    COUNT=\$(dinocell shards status ${out} | wc -l)
    """
}

process DINOCELL_RUN {
    tag "part ${part}"
    label 'process_medium'

    input:
    val part
    val out

    output:
    val part

    script:
    """
    dinocell shards run ${out} ${part}
    """
}

process DINOCELL_MERGE {
    label 'process_single'

    input:
    val parts
    val out

    output:
    stdout

    script:
    """
    dinocell shards merge ${out}
    """
}

workflow {
    images = file(params.images, checkIfExists: true)
    out = file(params.out)
    parts = DINOCELL_PLAN(images, out).flatMap { count -> (0..<(count as int)).toList() }
    DINOCELL_MERGE(DINOCELL_RUN(parts, out).collect(), out).view()
}
